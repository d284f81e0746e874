"""PEFT's directory: adapter_config.json and adapter_model.safetensors, both ways.

config.py      adapter_config.json <-> LoRAConfig
directory.py   the files <-> an Adapter: its configuration and its tensors
apply.py       an Adapter <-> a model
"""
