"""The embedded Hub: a local server that speaks the Hugging Face Hub's HTTP API.

The unmodified `huggingface_hub` client talks to it (with ``HF_HUB_DISABLE_XET=1``), so a dry run of a release
goes through the very code that a real one goes through. Repositories are bare Git repositories on disk.
"""
