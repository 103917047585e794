"""How the trainers' completions are decoded: by which loop, and with fp32 adapters that no rollout rounds."""

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from trainers import ReinforceConfig, ReinforceTrainer, generate_completions
from trainers.rollout import continuous_completions, generate, graph

PROMPTS = ["def f(x):\n", "a = 1\n", "import re\n", "b"]


def build(model, output_dir, **settings):
    return ReinforceTrainer(
        model,
        lambda completions, **kwargs: [float(len(completion)) for completion in completions],
        ReinforceConfig(
            str(output_dir),
            per_device_train_batch_size=4,
            max_completion_length=6,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            **({"max_steps": 2} | settings),
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )


@pytest.fixture
def policy(tiny_model):
    """An fp32 adapter on a bf16 base."""
    model = get_peft_model(
        tiny_model.to(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return model


def test_training_on_a_gpu_keeps_one_step_for_the_run(tmp_path, policy, monkeypatch):
    """The loop for CUDA, its step without the graph. The second rollout finds the step of the first."""
    monkeypatch.setattr(generate, "decoding_loop", lambda device: ("graph", None))
    made = []
    init = graph.TokenStep.__init__
    monkeypatch.setattr(graph.TokenStep, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    trainer = build(policy, tmp_path, bf16=True)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["completions/max_length"] == 6
    (step,) = made
    assert list(graph._KEPT[policy.get_base_model()].steps.values()) == [step]
    assert step.sampling == (1.0, 1.0, 0)
    moved = [not torch.equal(before[name], p) for name, p in policy.named_parameters() if p.requires_grad]
    assert all(moved)


@pytest.mark.parametrize(
    "distributed_type, zero3, expected",
    [
        (DistributedType.NO, False, True),
        (DistributedType.MULTI_GPU, False, True),
        (DistributedType.DEEPSPEED, False, True),
        (DistributedType.DEEPSPEED, True, False),
        (DistributedType.FSDP, False, False),
    ],
)
def test_sharded_weights_are_left_to_trls_way(tmp_path, policy, monkeypatch, distributed_type, zero3, expected):
    trainer = build(policy, tmp_path, bf16=True)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", distributed_type)
    monkeypatch.setattr("trainers.policy_gradient.is_deepspeed_zero3_enabled", lambda: zero3)
    assert trainer._has_own_rollout is expected


@pytest.mark.parametrize("settings", [{"min_p": 0.1}, {"repetition_penalty": 1.1}, {"cache_implementation": "dynamic"}])
def test_settings_that_only_transformers_knows_are_left_to_it(tmp_path, policy, settings):
    assert not build(policy, tmp_path, bf16=True, **settings)._has_own_rollout


def test_continuous_batching_leaves_the_adapter_in_fp32_bit_for_bit(tmp_path, policy, caplog):
    """What TRL's call does not: it casts the policy to bf16, and its trainer would go on with that."""
    trainer = build(
        policy,
        tmp_path,
        max_steps=1,
        bf16=True,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"num_blocks": 16, "max_batch_tokens": 256},  # all of the memory else
    )
    weights = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    rollouts = []
    generate_single_turn = trainer._generate_single_turn

    def rollout(*args):
        before = {name: (tensor.dtype, tensor.detach().clone()) for name, tensor in weights.items()}
        rollouts.append(generate_single_turn(*args))
        for name, (dtype, values) in before.items():
            assert weights[name].dtype == dtype and torch.equal(weights[name], values), name
        return rollouts[-1]

    trainer._generate_single_turn = rollout
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > 0
    assert not policy.training, "the evaluation went on in train mode"
    trainer.evaluate()
    assert len(rollouts) == 3
    assert rollouts[1] == rollouts[2] != rollouts[0], "evaluation is greedy, training samples"


def test_continuous_batching_decodes_the_tokens_of_the_loop_for_cpus(tiny_model, tiny_tokenizer):
    ends = list(range(20))
    prompt_ids = tiny_tokenizer([*PROMPTS, "b"])["input_ids"]
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=0)
    size = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
    completions = continuous_completions(tiny_model.train(), prompt_ids, config, size)
    assert tiny_model.training
    assert completions == generate_completions(tiny_model, prompt_ids, ends, 24, temperature=0)
    assert len(set(map(len, completions))) > 2


def test_a_request_that_continuous_batching_failed_is_an_error(tiny_model):
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=1, pad_token_id=0)
    too_small = ContinuousBatchingConfig(num_blocks=1, max_batch_tokens=256)
    with pytest.raises(RuntimeError, match="did not complete every prompt"):
        continuous_completions(tiny_model, [[5] * 300], config, too_small)
