"""What the LoRA papers measured, on any base, data and method: each study is a set of training runs and a verdict."""
