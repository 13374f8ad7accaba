"""The fast step: packed attention and a fused loss, put on a transformers model by `install.install`."""
