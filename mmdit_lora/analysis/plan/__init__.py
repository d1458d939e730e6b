"""Planning a training run: parameters, memory and FLOPs, without weights."""
