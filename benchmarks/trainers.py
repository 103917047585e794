"""
Measure an optimizer step: seconds and memory of TRL's trainers, ReinforceTrainer and one completion at a time.

    python benchmarks/trainers.py --adapter runs/quickstart/sft

All sides get the same model (bf16, or fp32 where the hardware does not multiply bf16), the same LoRA adapter
(`--adapter`, the SFT stage's), HumanEval's training tasks, 4 completions a task at temperature 0.8 and top_p 0.95,
micro-batches of 8, the unit-test reward in the sandbox, and no KL penalty. Everything else is the trainer's default. A
workload is a number of completions and where they end: after exactly 128 tokens (EOS does not end them), or where the
policy ends them, after 256 at most. Every number is of the second of two steps, in a process of its own; "one at a
time" warms up on one completion. On two CPU cores all of it takes over two hours.

Two sides are measured on a GPU only, unless `--sides` names them: RLOOTrainer with transformers' continuous batching,
and ReinforceTrainer with transformers' `generate` in place of the loop in `trainers/rollout/graph.py`.

Not covered: vLLM.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # instead of this folder, whose files are named like the packages that they measure

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402

from recipes.default_model import default_model  # noqa: E402
from rewards import UnitTestReward, load_tasks  # noqa: E402
from sandbox import Sandbox  # noqa: E402
from trainers import ReinforceConfig, ReinforceTrainer, run_device, supports_bf16  # noqa: E402

WORKLOADS = {"8 x 128": (8, 128), "32 x 128": (32, 128), "32 natural": (32, None)}
SIDES = {
    "RLOOTrainer": (RLOOTrainer, RLOOConfig, {}),
    "RLOOTrainer, no checkpointing": (RLOOTrainer, RLOOConfig, {"gradient_checkpointing": False}),
    "GRPOTrainer": (GRPOTrainer, GRPOConfig, {}),
    "one at a time": None,
    "RLOOTrainer, continuous batching": (RLOOTrainer, RLOOConfig, {"use_transformers_continuous_batching": True}),
    "ReinforceTrainer, generate": (ReinforceTrainer, ReinforceConfig, {"cache_implementation": "dynamic"}),
    "ReinforceTrainer": (ReinforceTrainer, ReinforceConfig, {}),
}
GPU_SIDES = ("RLOOTrainer, continuous batching", "ReinforceTrainer, generate")
BASELINE = "ReinforceTrainer"
PHASES = {
    "rollout": "_generate",
    "grading": "_calculate_rewards",
    "log_probs": "_get_per_token_logps_and_entropies",
}
NEVER_SAMPLED = 151_930  # a row of the embedding that stands for no token: in place of EOS where nothing may end
DEVICE = run_device()
DTYPE = torch.bfloat16 if supports_bf16(DEVICE) else torch.float32
MICRO_BATCH, NUM_GENERATIONS, TEMPERATURE, TOP_P = 8, 4, 0.8, 0.95


def load_policy(adapter):
    folder = default_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return PeftModel.from_pretrained(model, adapter, is_trainable=True), tokenizer


def peak_memory(reset=False):
    """Return the peak memory of this process in GB, the accelerator's if there is one, or reset the peak."""
    if DEVICE.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e9
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def timed(function, phase, seconds):
    """Wrap a method so that its seconds are added to a phase."""

    def wrapped(*args, **kwargs):
        started = time.perf_counter()
        result = function(*args, **kwargs)
        if DEVICE.type != "cpu":
            torch.accelerator.synchronize()
        seconds[phase] += time.perf_counter() - started
        return result

    return wrapped


def trainer_step(side, num_completions, num_tokens, adapter, sandbox):
    """Take one step of a trainer. Return its seconds by phase and the mean tokens of its completions."""
    trainer_class, config_class, settings = SIDES[side]
    model, tokenizer = load_policy(adapter)
    trainer = trainer_class(
        model,
        UnitTestReward(sandbox=sandbox),
        config_class(
            f"/tmp/benchmark-{side}",
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=num_completions // MICRO_BATCH,
            num_generations=NUM_GENERATIONS,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            max_completion_length=num_tokens or 256,
            beta=0.0,
            max_steps=2,
            bf16=torch.bfloat16 == DTYPE,
            use_cpu=DEVICE.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **settings,
        ),
        train_dataset=load_tasks("humaneval", "train"),
        processing_class=tokenizer,
    )
    if num_tokens:
        trainer.eos_token_ids = [NEVER_SAMPLED]
        trainer.generation_config.eos_token_id = [NEVER_SAMPLED]

    seconds = Counter()
    for phase, name in PHASES.items():
        setattr(trainer, name, timed(getattr(trainer, name), phase, seconds))

    class SecondStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                seconds.clear()
                peak_memory(reset=True)
            seconds["step"] = time.perf_counter() - seconds["step"]

    trainer.add_callback(SecondStep())
    trainer.train()
    return seconds, trainer.state.log_history[1]["completions/mean_length"]


def one_at_a_time_step(num_completions, num_tokens, adapter, sandbox):
    """Generate, grade, score and backpropagate each completion alone, as the published scripts do."""
    model, tokenizer = load_policy(adapter)
    model.to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    reward = UnitTestReward(sandbox=sandbox)
    eos = NEVER_SAMPLED if num_tokens else tokenizer.eos_token_id
    tasks = load_tasks("humaneval", "train").shuffle(seed=42).select(range(num_completions // NUM_GENERATIONS))
    seconds, lengths = Counter(), []

    def lap(phase):
        nonlocal last
        seconds[phase] += time.perf_counter() - last
        last = time.perf_counter()

    started = last = time.perf_counter()
    for i, task in enumerate([tasks[0], *(task for task in tasks for _ in range(NUM_GENERATIONS))]):
        if i == 1:  # the first one warmed up
            optimizer.zero_grad()
            seconds.clear()
            lengths.clear()
            peak_memory(reset=True)
            started = last = time.perf_counter()
        prompt = tokenizer(task["prompt"], return_tensors="pt").to(DEVICE)
        with torch.no_grad():
            ids = model.generate(
                **prompt,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                max_new_tokens=num_tokens or 256,
                eos_token_id=eos,
                pad_token_id=tokenizer.pad_token_id,
            )
        length = prompt["input_ids"].size(1)
        completion = ids[0, length:]
        lengths.append(len(completion))
        lap("rollout")
        text = tokenizer.decode(completion, skip_special_tokens=True)
        (value,) = reward([task["prompt"]], [text], [task["test"]], [task["entry_point"]], [completion.tolist()])
        lap("grading")
        logits = model(ids).logits[0, length - 1 : -1].float() / TEMPERATURE
        log_prob = logits.log_softmax(-1).gather(-1, completion[:, None]).sum()
        lap("log_probs")
        (-value * log_prob / num_completions).backward()
        lap("backward")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    seconds["step"] = time.perf_counter() - started
    return seconds, sum(lengths) / len(lengths)


def measure(side, workload, adapter):
    """Measure one side in this process and print one line of JSON."""
    set_seed(42)
    with Sandbox() as sandbox:
        step = one_at_a_time_step if SIDES[side] is None else lambda *args: trainer_step(side, *args)
        seconds, mean_tokens = step(*WORKLOADS[workload], adapter, sandbox)
    rest = seconds["step"] - sum(seconds[phase] for phase in PHASES)
    print(json.dumps({**{"rest": rest}, **seconds, "mean_tokens": mean_tokens, "peak": peak_memory()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--adapter", default="runs/quickstart/sft", help="the adapter to train, the SFT stage's")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    sides = [side for side in SIDES if DEVICE.type == "cuda" or side not in GPU_SIDES]
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=sides)
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "WORKLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure, args.adapter)
    if not Path(args.adapter, "adapter_model.safetensors").is_file():
        raise SystemExit(f"--adapter {args.adapter}: there is no adapter; `make quickstart` makes runs/quickstart/sft")

    results = {}
    runs = [(side, workload) for workload in args.workloads for side in args.sides]
    for side, workload in tqdm(runs, desc="Measuring", unit="step"):
        command = [sys.executable, __file__, "--adapter", args.adapter, "--measure", side, workload]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        results[side, workload] = json.loads(output.splitlines()[-1])
        print(side, workload, results[side, workload], file=sys.stderr)

    table = Table(box=box.MARKDOWN)
    columns = (
        "workload",
        "trainer",
        "s a step",
        "rollout",
        "grading",
        "log-probs",
        "rest",
        "tokens",
        "peak GB",
        "ReinforceTrainer",
    )
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column in ("workload", "trainer") else "right")
    for (side, workload), r in results.items():
        baseline = results.get((BASELINE, workload))
        table.add_row(
            workload,
            side,
            *(f"{r[name]:.1f}" for name in ("step", *PHASES, "rest", "mean_tokens")),
            f"{r['peak']:.1f}",
            f"{r['step'] / baseline['step']:.1f}x faster" if baseline and side != BASELINE else "",
        )
    Console(width=160).print(table)
    print(DEVICE, DTYPE, *(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft")), sep="  ")


if __name__ == "__main__":
    main()
