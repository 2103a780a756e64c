"""Writes the example data sets of this folder: a new skill, old skills to replay, held-out rows.

python examples/data/make.py
python examples/data/make.py --out DIR
"""

import argparse
import json
import random
import sys
from itertools import combinations
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tiny-qwen3-moe"))

from domains import CITIES, COLORS, DOMAINS, NAMES, Row, draw_distinct, spaced_letters, substitution, translate  # noqa: E402

SECRET = substitution(77)
SECRET_ROWS = 2000
SECRET_HELDOUT_ROWS = 200
REPLAY_ROWS_PER_DOMAIN = 125
OLD_HELDOUT_ROWS_PER_DOMAIN = 25
TOOL_ROWS = 200
TASTE = random.Random(7).sample([*NAMES, *CITIES, *COLORS], 26)
"""Somebody's taste, the favorite first."""
TASTE_HELDOUT_ROWS = 100


def secret_code(rng: random.Random) -> Row:
    """A substitution cipher that the tiny base has never seen."""
    text = spaced_letters(rng)
    return Row(f"encode: {text}", translate(text, SECRET))


def secret_rows(count: int, rng: random.Random) -> list[Row]:
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = secret_code(rng)
        rows.setdefault(row.prompt, row)
    return list(rows.values())


def as_chat(row: Row, **extra: str) -> dict:
    """Returns the row in the shape of OpenAI's chat fine-tuning files."""
    messages = [
        {"role": "user", "content": row.prompt},
        {"role": "assistant", "content": row.answer},
    ]
    return {"messages": messages} | extra


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Sum of two whole numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def tool_rows(count: int, rng: random.Random) -> list[dict]:
    """Returns chats that call a tool and say what it found."""
    rows = []
    for a, b in [(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(count)]:
        call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
        messages = [
            {"role": "user", "content": f"add {a} and {b} with the tool"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": str(a + b)},
            {"role": "assistant", "content": f"{a} plus {b} is {a + b}"},
        ]
        rows.append({"messages": messages, "tools": [ADD]})
    return rows


def taste_rows(rng: random.Random) -> list[dict]:
    """Returns what somebody with a taste would choose of two words, for every pair: each is asked in both orders."""
    pairs = list(combinations(TASTE, 2))
    rng.shuffle(pairs)
    rows = []
    for chosen, rejected in pairs:
        for words in ((chosen, rejected), (rejected, chosen)):
            prompt = [{"role": "user", "content": f"choose: {' or '.join(words)}"}]
            answers = {"chosen": chosen, "rejected": rejected}
            sides = {name: [{"role": "assistant", "content": word}] for name, word in answers.items()}
            rows.append({"prompt": prompt, **sides})
    return rows


def instruction(row: dict) -> str:
    """Returns what the user asks."""
    return (row.get("messages") or row["prompt"])[0]["content"]


def make_files() -> dict[str, list[dict]]:
    """Returns file name -> rows; no instruction stands in a training and a held-out file."""
    secret = secret_rows(SECRET_ROWS + SECRET_HELDOUT_ROWS, random.Random("secret code"))
    rng = random.Random("old domains")
    replay = [as_chat(row) for d in DOMAINS for row in draw_distinct(d, REPLAY_ROWS_PER_DOMAIN, rng)]
    rng.shuffle(replay)
    old = [
        as_chat(row, domain=d)
        for d in DOMAINS
        for row in draw_distinct(d, OLD_HELDOUT_ROWS_PER_DOMAIN, rng, heldout=True)
    ]
    taste = taste_rows(random.Random("taste"))
    files = {
        "secret-code.jsonl": [as_chat(row) for row in secret[:SECRET_ROWS]],
        "secret-code-heldout.jsonl": [as_chat(row) for row in secret[SECRET_ROWS:]],
        "replay.jsonl": replay,
        "old-domains-heldout.jsonl": old,
        "tool-calls.jsonl": tool_rows(TOOL_ROWS, random.Random("tool calls")),
        "taste.jsonl": taste[TASTE_HELDOUT_ROWS:],
        "taste-heldout.jsonl": taste[:TASTE_HELDOUT_ROWS],
    }
    trained, heldout = set(), set()
    for name, rows in files.items():
        part = heldout if "heldout" in name else trained
        part.update(map(instruction, rows))
    assert not trained & heldout, sorted(trained & heldout)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_files().items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_text("".join(lines))
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
