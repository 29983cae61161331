"""Evaluation of a model's knowledge by multiple-choice questions, by likelihood. Needs the extra `evaluation`."""

from craft_optim.evaluation.mcq import ChoiceScore, Result, Scorer, Summary, compare, evaluate, summarise
from craft_optim.evaluation.questions import Question, read_questions
from craft_optim.evaluation.scorers import load_scorer

__all__ = [
    "ChoiceScore",
    "Question",
    "Result",
    "Scorer",
    "Summary",
    "compare",
    "evaluate",
    "load_scorer",
    "read_questions",
    "summarise",
]
