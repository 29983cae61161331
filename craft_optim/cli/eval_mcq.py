"""craft-optim eval-mcq: does a fine-tuned model still know the answers?"""

from craft_optim.cli.options import AddCommand, existing_file, whole

__all__ = ["add"]

_EXAMPLES = """\
  craft-optim eval-mcq questions.jsonl --model=outputs/checkpoints/last/pretrained_model
  craft-optim eval-mcq questions.jsonl --model=lerobot/pi0fast-base \\
      --versus=outputs/checkpoints/last/pretrained_model --json=mcq.json      # what has fine-tuning cost?
  craft-optim eval-mcq questions.jsonl --model=my_script.py:scorer

A line of questions.jsonl, image_path relative to it and only where there is a picture:

  {"image_path": "ice.png", "question": "What is this?", "choices": ["ice", "fire"], "answer_index": 0}

A model is a pi0_fast of lerobot, or a language model or vision-language model of transformers, by folder or hub id,
adapters included; or a function without arguments that returns a scorer: question -> one ChoiceScore of
craft_optim.evaluation for each choice.

Templates end where the choice begins. Unless told otherwise pi0_fast and PaliGemma are asked as PaliGemma was taught,
"answer en {question}\\n{choice}"; other vision-language models in their chat template; and language models
"Question: {question}\\nAnswer: {choice}".

A choice counts by the mean log-likelihood of its tokens, or by their sum. A question is answered rightly if the right
choice is above all others: ties, and questions that could not be scored, count as wrong.
"""


def add(command: AddCommand) -> None:
    """The command and its options."""
    about = "Ask multiple-choice questions: how much does a model know, and how much does it still know?"
    add = command("eval-mcq", about, _EXAMPLES).add_argument
    add("questions", metavar="QUESTIONS", type=existing_file, help="JSONL file with a question per line")
    model = "folder, hub id or FILE:FUNCTION"
    add("--model", "--policy.path", dest="model", metavar="MODEL", required=True, help=f"whom to ask: {model}")
    add("--versus", metavar="MODEL", help="a second model, compared with the first: what has it lost?")
    template = 'with {question} and, at its end, {choice}; or "chat" (default: by the model)'
    add("--template", metavar="TEXT", help=template)
    score = "mean over a choice's tokens, or sum (default: normalized)"
    add("--score", choices=["normalized", "sum"], default="normalized", help=score)
    add("--limit", type=whole, metavar="N", help="N questions, evenly spread over the file (default: all)")
    add("--batch-size", type=whole, metavar="N", help="choices of a question per forward (default: 16)")
    add("--device", default="auto", help="where models run (default: auto: CUDA if there is, else the CPU)")
    add("--json", metavar="FILE", help="write summary, comparison and every question's scores")
