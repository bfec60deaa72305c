"""The public operations, one file each: checks, schema and fake kernel, autograd, choice of backend."""
