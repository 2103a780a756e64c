"""The synthetic skills of the tiny base: every domain draws rows of (instruction, answer).

Letters are written with spaces between them and digits without, so that the byte-pair tokenizer
always sees single characters where a skill works on characters.

A row belongs to the held-out part when a hash of its instruction says so: what is measured is
never trained on, whatever the seed.
"""

import random
import string
import zlib
from collections.abc import Callable
from typing import NamedTuple

LETTERS = string.ascii_lowercase
HELDOUT_ONE_IN = 10

CLOSER = {"(": ")", "[": "]", "{": "}", "<": ">"}
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
UNITS = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("l", "ml", 1000),
    ("bar", "mbar", 1000),
)
NAMES = ("ann", "bob", "cleo", "dan", "eve", "fay", "gus", "ivy", "jon", "kim", "leo", "mia")
CITIES = ("rome", "oslo", "lima", "cairo", "paris", "delhi", "quito", "seoul")
COLORS = ("red", "blue", "lime", "gray", "pink", "gold")
# fmt: off
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on


class Row(NamedTuple):
    """One exchange: what the user asks, the exact answer, and a reasoning trace or ""."""

    prompt: str
    answer: str
    reasoning: str = ""


def spaced_letters(rng: random.Random, shortest: int = 3, longest: int = 8) -> str:
    return " ".join(rng.choices(LETTERS, k=rng.randint(shortest, longest)))


def substitution(seed: int) -> dict[str, str]:
    """Returns a cipher: a permutation of the 26 letters, the space unchanged."""
    shuffled = random.Random(seed).sample(LETTERS, k=len(LETTERS))
    return dict(zip(LETTERS, shuffled, strict=True)) | {" ": " "}


def translate(text: str, cipher: dict[str, str]) -> str:
    return "".join(cipher[character] for character in text)


ELVISH, ORCISH = substitution(11), substitution(22)


def add(rng: random.Random) -> Row:
    a, b = rng.randint(10, 99), rng.randint(1, 9)
    ones = a % 10 + b
    carry = ones // 10
    trace = f"{a % 10}+{b}={ones}, {a // 10}+{carry}={a // 10 + carry}"
    return Row(f"add: {a}+{b}", str(a + b), trace)


def close(rng: random.Random) -> Row:
    """Brackets, some already closed; the answer closes the rest in the right order."""
    opened, text = [], []
    for _ in range(rng.randint(3, 9)):
        if opened and rng.random() < 0.4:
            text.append(CLOSER[opened.pop()])
        else:
            opened.append(rng.choice("([{<"))
            text.append(opened[-1])
    answer = " ".join(CLOSER[bracket] for bracket in reversed(opened))
    return Row("close: " + " ".join(text), answer or "done")


def reverse(rng: random.Random) -> Row:
    text = spaced_letters(rng)
    return Row(f"reverse: {text}", text[::-1])


def copy(rng: random.Random) -> Row:
    text = spaced_letters(rng).upper()
    return Row(f"copy: {text}", text)


def lookup(rng: random.Random) -> Row:
    keys = rng.sample(COLORS[:4], rng.randint(2, 4))
    values = [str(rng.randint(10, 99)) for _ in keys]
    wanted = rng.randrange(len(keys))
    pairs = " ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    return Row(f"lookup {keys[wanted]}: {pairs}", values[wanted])


def date(rng: random.Random) -> Row:
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    return Row(f"date: {year}-{month:02d}-{day:02d}", f"{day} {MONTHS[month - 1]} {year}")


def convert(rng: random.Random) -> Row:
    amount = rng.randint(1, 299)
    unit, smaller, factor = rng.choice(UNITS)
    trace = f"1 {unit} = {factor} {smaller}"
    return Row(f"convert: {amount} {unit}", f"{amount * factor} {smaller}", trace)


def extract(rng: random.Random) -> Row:
    """One field of a small JSON object."""
    record = {
        "id": rng.randint(10, 999),
        "name": rng.choice(NAMES),
        "city": rng.choice(CITIES),
        "color": rng.choice(COLORS),
    }
    fields = rng.sample(list(record), 3)
    wanted = rng.choice(fields)
    quoted = {k: v if isinstance(v, int) else f'"{v}"' for k, v in record.items()}
    body = ", ".join(f'"{field}": {quoted[field]}' for field in fields)
    return Row(f"get {wanted}: {{{body}}}", str(record[wanted]))


def sort(rng: random.Random) -> Row:
    digits = rng.choices(string.digits, k=rng.randint(3, 6))
    return Row("sort: " + "".join(digits), "".join(sorted(digits)))


def elvish(rng: random.Random) -> Row:
    text = spaced_letters(rng)
    return Row(f"elvish: {text}", translate(text, ELVISH))


def orcish(rng: random.Random) -> Row:
    text = spaced_letters(rng)
    return Row(f"orcish: {text}", translate(text, ORCISH))


def spell(rng: random.Random) -> Row:
    number = rng.randint(1, 999)
    hundreds, rest = divmod(number, 100)
    words = [ONES[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        words += [TENS[rest // 10 - 2]] + ([ONES[rest % 10]] if rest % 10 else [])
    elif rest:
        words.append(ONES[rest])
    return Row(f"spell: {number}", " ".join(words))


DOMAINS: dict[str, Callable[[random.Random], Row]] = {
    make.__name__: make
    for make in (add, close, reverse, copy, lookup, date, convert, extract, sort, elvish, orcish, spell)
}


def is_heldout(prompt: str) -> bool:
    return zlib.crc32(prompt.encode()) % HELDOUT_ONE_IN == 0


def draw(domain: str, rng: random.Random, heldout: bool = False) -> Row:
    """Returns one row of the domain from the training part, or from the held-out part."""
    while True:
        row = DOMAINS[domain](rng)
        if is_heldout(row.prompt) == heldout:
            return row


def draw_distinct(domain: str, count: int, rng: random.Random, heldout: bool = False) -> list[Row]:
    """Returns `count` rows with different instructions."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = draw(domain, rng, heldout)
        rows.setdefault(row.prompt, row)
    return list(rows.values())
