"""
DPO on a policy's own programs, in one script: sample, grade, and prefer each task's best program to its worst.

    python examples/dpo.py --model_name_or_path Qwen/Qwen2.5-Coder-0.5B-Instruct --output_dir runs/own_dpo --use_peft

On a machine without a GPU add `--use_cpu`; without the Hub, give the directory that `python recipes/default_model.py`
prints. For long runs use the stages `preferences` and `dpo` in `recipes/`: they batch several tasks, resume after an
interruption, choose pairs by a rule, and train on the sampled token ids.
"""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config

from rewards import UnitTestReward, load_tasks
from trainers import generate_completions

NUM_TASKS, NUM_GENERATIONS, MAX_COMPLETION_LENGTH = 16, 8, 128


def preference_pairs(model, tokenizer) -> Dataset:
    """Form pairs in TRL's format, one for each task whose samples differ in reward."""
    reward, pairs = UnitTestReward(length_penalty=0.01), []
    ends = model.generation_config.eos_token_id  # chat models have several
    eos_token_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    for task in load_tasks("humaneval", "train").select(range(NUM_TASKS)):
        prompt_ids = [tokenizer(task["prompt"])["input_ids"]] * NUM_GENERATIONS
        ids = generate_completions(
            model, prompt_ids, list(eos_token_ids), MAX_COMPLETION_LENGTH, temperature=0.8, top_p=0.95
        )
        completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
        columns = {name: [task[name]] * NUM_GENERATIONS for name in ("test", "entry_point")}
        rewards = reward([task["prompt"]] * NUM_GENERATIONS, completions, completion_ids=ids, **columns)
        judged = [number for number in rewards if number is not None]
        if judged and max(judged) > min(judged):
            best, worst = rewards.index(max(judged)), rewards.index(min(judged))
            pairs.append({"prompt": task["prompt"], "chosen": completions[best], "rejected": completions[worst]})
    if not pairs:
        raise SystemExit("all completions of each task have the same reward: sample more, or longer ones")
    return Dataset.from_list(pairs)


def main() -> None:
    args, model_args = TrlParser((DPOConfig, ModelConfig)).parse_args_and_config()
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype="auto").to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=preference_pairs(model, tokenizer),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
