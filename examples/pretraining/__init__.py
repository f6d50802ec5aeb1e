"""What `pretrain.py` is made of: data, options, the two methods, the loop, checkpoints, plots."""
