"""The one room for names that Megatron-Core, torch and Transformer Engine do not promise to keep.

A file here may import a private module, read a private attribute or assign into a foreign module; no other file of the
product may. Each such reach names the versions it is written for and what it relies on.
`tests/engine/megatron/test_contracts.py` checks the installed versions against that and runs before every other test.

Versions: Megatron-Core 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12 and later), torch 2.11 to 2.13, and, on GPUs,
Transformer Engine 2.20.
"""
