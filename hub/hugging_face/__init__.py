"""Adapters from and to Hugging Face repositories, `hf://user/repo@revision`."""
