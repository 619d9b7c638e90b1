"""The mathematics of EDiT: tensors and numbers in, tensors and numbers out.

No process group, no module, no transformers, no Accelerate; time and ranks are inputs.
"""
