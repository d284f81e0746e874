"""The base model: loading, device and precision, cheaper steps."""
