"""Fixtures: a tiny policy with a byte tokenizer, built here and saved as a folder that recipes can load."""

import os
import sys
from pathlib import Path

# Read when huggingface_hub is imported: neither a test nor a subprocess of it reaches for the network
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: two threads of so small a model wait for each other
# Read when CUDA starts: the suite computes on the CPU of a machine with a GPU, and so do its subprocesses. Only a call
# that names tests/gpu sees the GPU
GPU_TESTS = Path(__file__).parent / "gpu"
if not any(Path(argument.partition("::")[0]).resolve().is_relative_to(GPU_TESTS) for argument in sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random Qwen2 of 50,000 parameters, fp32, one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.3,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture
def tiny_tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder, padding_side="left")
