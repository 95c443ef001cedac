"""The Sparsifier in other people's training loops; each module needs that loop's package.

``resconv.integrations.lightning.SparsityCallback``    a Lightning ``Callback``
``resconv.integrations.huggingface.SparsityCallback``  a Hugging Face ``TrainerCallback``
"""
