"""Makes words.jsonl: what 300 nouns mean, four choices each, from WordNet 3.0.

    python make_words.py FOLDER    # with data.noun and cntlist.rev: /usr/share/wordnet of Debian's wordnet-base

The nouns are common ones, by WordNet's count of their first sense; wrong choices are the meanings of other nouns of the
file. WordNet is Princeton University's, and may be passed on with its licence, which is beside this file.
"""

import json
import random
import re
import sys
from pathlib import Path

COUNT, CHOICES, SEED = 300, 4, 0
LEAST, MOST = 4, 14  # words of a meaning


def meanings(folder: Path) -> dict[str, str]:
    """Noun -> the meaning of its first sense, the most frequent nouns first."""
    glosses = {}
    for line in (folder / "data.noun").read_text("utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        entry, _, gloss = line.partition(" | ")
        fields = entry.split()
        for place in range(int(fields[3], 16)):
            word, number = fields[4 + 2 * place], int(fields[5 + 2 * place], 16)
            glosses[f"{word.lower()}%1:{int(fields[1]):02}:{number:02}"] = re.split(r";|:", gloss)[0].strip()
    found: dict[str, str] = {}
    for line in (folder / "cntlist.rev").read_text("utf-8").splitlines():
        key, sense, times = line.split()
        found |= {f"{int(times):06} {key}": sense} if "%1:" in key else {}
    result: dict[str, str] = {}
    for entry in sorted(found, reverse=True):
        key = entry.split()[1]
        word, gloss = key.partition("%")[0], glosses.get(key.rsplit(":", 2)[0], "")
        plain = re.fullmatch("[a-z]{4,12}", word) and re.fullmatch(r"[a-z' -]+", gloss)
        if plain and found[entry] == "1" and LEAST <= len(gloss.split()) <= MOST and word[:4] not in gloss:
            result.setdefault(word, gloss)
    return result


def questions(folder: Path) -> list[dict[str, object]]:
    """The questions, as `craft-optim eval-mcq` reads them."""
    draw = random.Random(SEED)
    known = list(meanings(folder).items())[: 2 * COUNT]
    chosen = known[::2]
    made: list[dict[str, object]] = []
    for word, meaning in chosen:
        wrong = draw.sample(sorted({gloss for other, gloss in known if gloss != meaning}), CHOICES - 1)
        answer = draw.randrange(CHOICES)
        choices = [*wrong[:answer], meaning, *wrong[answer:]]
        made.append(
            {"id": word, "question": f'The word "{word}" (noun) means:', "choices": choices, "answer_index": answer}
        )
    return made


if __name__ == "__main__":
    lines = [json.dumps(question) for question in questions(Path(sys.argv[1]))]
    (Path(__file__).parent / "words.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} questions")
