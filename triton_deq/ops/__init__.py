"""One module an op: argument checks, launcher, autograd.Function, public function."""
