"""Other people's trainers on our kernels. Nothing of ours imports from here but `aepo bench trainers`."""
