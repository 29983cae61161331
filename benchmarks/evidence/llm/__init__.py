"""The pieces of `retention_llm.py`: a chat model is fine-tuned on the manual of Python, and asked what it knew.

- `setup`: the model, the new task's chats, the anchors.
- `asked`: what it is asked besides the anchors: words, instructions, sample answers.
- `methods`: what is compared, and one training step of each.
- `runs`: one run: trained, measured, written as JSON.
- `summary`, `figure`: rows over seeds as Markdown, and the picture.
- `command`: the command line, which runs are made where, and the page of docs/.
"""
