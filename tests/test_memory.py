"""The rule by which gradient checkpointing is decided, on a pretended GPU; and waiting for it."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from reference_update import COMMON, RecordingReward, dataset, policy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, Qwen2Config, Qwen2Model
from trl import ModelConfig

from recipes.common.policy import check_memory
from trainers import PPOClipConfig, PPOClipTrainer, ReinforceConfig, ReinforceTrainer
from trainers.memory import activation_bytes, longest_prompt, needs_checkpointing

QWEN_0_5B = Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
GPU = torch.device("cuda")


def kept_bytes(config, num_rows, num_tokens, checkpointing):
    """What autograd keeps of a forward in bf16 with LoRA on all layers, the weights aside."""
    model = Qwen2Model._from_config(config, attn_implementation="sdpa").to(torch.bfloat16).train()
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=False)
    if checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(5, config.vocab_size, (num_rows, num_tokens))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("intermediate", [512, 2048])
def test_the_estimate_is_what_autograd_keeps(intermediate, checkpointing):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": intermediate}
    one, three = (
        kept_bytes(Qwen2Config(num_hidden_layers=layers, **sizes, **heads), 2, 64, checkpointing) for layers in (1, 3)
    )
    estimates = [
        activation_bytes(Qwen2Config(num_hidden_layers=layers, **sizes, **heads), 2 * 64, checkpointing=checkpointing)
        for layers in (1, 3)
    ]
    assert three - one == pytest.approx(estimates[1] - estimates[0], rel=0.15)


@pytest.mark.parametrize(
    "free, num_rows, num_tokens, expected",
    [
        (80e9, 32, 250 + 128, False),  # 17 GB
        (22e9, 32, 250 + 128, True),
        (22e9, 8, 250 + 128, False),
        (None, 8, 250 + 128, True),  # torch cannot tell
        (80e9, 8, None, True),  # a stream of tasks
    ],
)
def test_checkpointing_where_activations_take_more_than_half(monkeypatch, free, num_rows, num_tokens, expected):
    monkeypatch.setattr("trainers.memory.free_memory", lambda device: free)
    assert needs_checkpointing(QWEN_0_5B, num_rows, num_tokens, GPU, torch.bfloat16) is expected
    assert needs_checkpointing(QWEN_0_5B, num_rows, num_tokens, torch.device("cpu"), torch.bfloat16) is False


def test_the_estimate_of_the_documented_example():
    assert activation_bytes(QWEN_0_5B, 1) == 1_406_976
    assert activation_bytes(QWEN_0_5B, 32 * (250 + 128)) == pytest.approx(17e9, rel=0.01)
    assert activation_bytes(QWEN_0_5B, 1, torch.float32) == 2 * 1_406_976
    assert activation_bytes(MixtralConfig(), 1) is None


def test_longest_prompt(tiny_tokenizer):
    assert longest_prompt(Dataset.from_dict({"prompt": ["abc", "abcdef"]}), tiny_tokenizer) == 6
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ '>' if add_generation_prompt }}"
    )
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("abc", "a")]})
    assert longest_prompt(chats, tiny_tokenizer) == 6
    assert longest_prompt(chats.to_iterable_dataset(), tiny_tokenizer) is None


@pytest.mark.parametrize("needs_it", [True, False])
@pytest.mark.parametrize("with_adapter", [True, False])
def test_what_the_configuration_leaves_open_is_decided_before_the_first_step(
    tmp_path, tiny_model, monkeypatch, needs_it, with_adapter
):
    asked = []

    def answer(config, **numbers):
        asked.append(numbers)
        return needs_it

    monkeypatch.setattr("trainers.policy_gradient.needs_checkpointing", answer)
    config = ReinforceConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=1, **COMMON)
    assert config.gradient_checkpointing is False
    config.gradient_checkpointing = config.activation_checkpointing = None  # as on an accelerator
    model = policy(tiny_model) if with_adapter else tiny_model
    trainer = ReinforceTrainer(model, RecordingReward(), config, train_dataset=dataset())
    numbers = {"num_rows": 2, "num_tokens": 30 + 6, "device": torch.device("cpu"), "dtype": torch.float32}
    assert asked == [numbers]
    trainer.train()
    assert trainer.model.is_activation_checkpointing is needs_it
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_batch_that_cannot_fit_is_refused(tmp_path, tiny_folder, tiny_tokenizer, monkeypatch):
    model_args = ModelConfig(str(tiny_folder), dtype="bfloat16")
    settings = COMMON | {"gradient_checkpointing": None, "bf16": True, "max_completion_length": 70}
    tasks = dataset()

    def check(free, **fields):
        monkeypatch.setattr("recipes.common.policy.free_memory", lambda device: free)
        config = ReinforceConfig(str(tmp_path), per_device_train_batch_size=1000, **settings | fields)
        check_memory(model_args, config, tasks, tiny_tokenizer)

    # 100 tokens a row, 2 layers of 32 with an MLP of 64: 2 * (4 * 64 + 11 * 32) values a token, 672 with checkpointing
    check(free=0.3e9)
    check(free=0.15e9, gradient_checkpointing=True)
    check(free=None)
    with pytest.raises(SystemExit) as error:
        check(free=0.2e9, gradient_checkpointing=False)
    assert str(error.value) == (
        "per_device_train_batch_size is 1000: with prompts of up to 30 tokens and completions of 70 the activations "
        "take 0.2 GB without gradient_checkpointing, the weights take 0.0, and 0.2 GB of the GPU are free: lower it, "
        "and raise gradient_accumulation_steps"
    )
    with pytest.raises(SystemExit, match="the activations take 0.1 GB, the weights"):
        check(free=0.1e9, gradient_checkpointing=True)


class Waits(TorchDispatchMode):
    """Collects the operators that make the host wait for a GPU: those whose result's value or shape it needs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_indexed_by_bool = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        names = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
        if is_indexed_by_bool or func.overloadpacket.__name__ in names:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_micro_batch_waits_for_its_metrics_alone(tmp_path, tiny_model, monkeypatch, level):
    config = PPOClipConfig(
        str(tmp_path), per_device_train_batch_size=2, dual_clip=3.0, importance_sampling_level=level, **COMMON
    )
    trainer = PPOClipTrainer(policy(tiny_model), RecordingReward(), config, train_dataset=dataset())
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: (logps, -logps, None))
    ids, mask = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1, 1], [1, 0]])
    inputs = {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": ids, "completion_mask": mask}
    inputs |= {"advantages": torch.tensor([1.0, -1.0]), "old_per_token_logps": logps.detach() - 0.1}
    with Waits() as waits:
        loss = trainer.compute_loss(trainer.model, inputs)
    assert waits.seen == [], "tolist() of the stacked metrics is not an operator"
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert metrics["entropy"] == pytest.approx((1 + 2 + 3) / 3)
    assert metrics["ratio/max"] == pytest.approx(torch.tensor(0.2 if level == "sequence" else 0.1).exp().item())


def test_auto_find_batch_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size would change the number of completions"):
        ReinforceConfig(str(tmp_path), auto_find_batch_size=True)
