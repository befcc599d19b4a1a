"""CUDA source without what no time depends on: comments, formatting, local names, and functions of
shared headers that it does not call.
"""

import re
from collections import Counter

_TOKEN = re.compile(
    r"""(?P<space>//[^\n]*|/\*.*?\*/|\\\n|[^\S\n]+)
    |(?P<line>\n)
    |"(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'
    |(?P<name>[A-Za-z_]\w*)
    |\.?\d(?:[eEpP][+-]|[\w.])*
    |<<= | >>= | \+\+ | -- | -> | :: | \#\# | << | >> | [<>=!]= | && | \|\| | [-+*/%&|^]= | .""",
    re.DOTALL | re.VERBOSE,
)
_TYPES = frozenset(
    [
        "auto",
        "bool",
        "char",
        "double",
        "float",
        "int",
        "long",
        "short",
        "signed",
        "unsigned",
        "void",
    ]
)
_VECTOR = re.compile(r"u?(char|short|int|long|float|double|longlong)[1-4]")
_BETWEEN = frozenset(["*", "&", "const", "volatile"])  # a type and the name declared with it
_NOT_NAMES = _TYPES | _BETWEEN | frozenset(["operator", "struct", "static", "constexpr"])


def _tokens(source: str) -> list[str]:
    """Its tokens; a line's end is one only where it ends a directive."""
    found: list[str] = []
    directive = False
    for match in _TOKEN.finditer(source):
        if match["space"]:
            continue
        if match["line"]:
            if directive:
                found.append("\n")
            directive = False
            continue
        directive |= match[0] == "#"
        found.append(match[0])
    return found


def _definitions(tokens: list[str]) -> list[list[str]]:
    """The tokens of each directive and of each declaration or definition outside of all braces."""
    found: list[list[str]] = [[]]
    depth = 0
    for i, token in enumerate(tokens):
        found[-1].append(token)
        depth += (token in "({[") - (token in ")}]")
        body_ends = token == "}" and tokens[i + 1 : i + 2] != [";"]
        if depth == 0 and (body_ends or token in (";", "\n")):
            found.append([])
    return found


def _name(definition: list[str]) -> str | None:
    """Of a function for the device; None for anything else."""
    before, _, after = " ".join(definition).partition("DEVICE ")
    if not after or "#" in before or "struct" in before.split():
        return None
    return definition[definition.index("(", before.count(" ")) - 1]


def _called(tokens: list[str]) -> list[str]:
    """Tokens without the functions for the device whose names stand nowhere else."""
    definitions = _definitions(tokens)
    while True:
        places = Counter(name for one in definitions for name in {*one})
        own = Counter(_name(one) for one in definitions)
        kept = [one for one in definitions if not (n := _name(one)) or places[n] > own[n]]
        if len(kept) == len(definitions):
            return [token for one in kept for token in one]
        definitions = kept


def essence(source: str) -> list[str]:
    """Its tokens, with the number of its declaration in place of every name declared there, and
    without functions that are not called.

    A declaration is a name after a type, or after a comma where a statement has declared one.
    What is not recognised as one keeps its name, and so do a struct's members and a builtin:
    there a new name counts as a change, which is the safe side.
    """
    tokens, made = _called(_tokens(source)), []
    scopes: list[dict[str, str]] = [{}]
    types, members = set(_TYPES), [False]  # members: whether each open brace is a struct's
    depth, declaring, count, struct, typedef = 0, -1, 0, False, False
    for i, token in enumerate(tokens):
        before = i - 1
        while before >= 0 and tokens[before] in _BETWEEN:
            before -= 1
        kind = tokens[before] if before >= 0 else ""
        if not re.match(r"[A-Za-z_]", token):
            if token in "([{":
                depth += 1
            elif token in ")]}":
                depth -= 1
                declaring = min(declaring, depth)
            if token == "{":
                scopes.append(dict(scopes[-1]))
                members.append(struct)
                struct = False
            elif token == "}" and len(scopes) > 1:
                scopes.pop(), members.pop()
            elif token in ";\n":
                declaring, typedef = -1, False
            made.append(token)
            continue
        typedef |= token == "typedef"
        if token in _NOT_NAMES or token.startswith("__") or tokens[max(i - 1, 0)] in (".", "->"):
            made.append(token)
            continue
        macro = tokens[max(i - 2, 0) : i] == ["#", "define"]
        declared = kind in types or bool(_VECTOR.fullmatch(kind)) or kind == "struct" or macro
        declared |= kind == "," and declaring == depth
        if declared and not (token in types or _VECTOR.fullmatch(token)):
            if kind == "struct" or typedef:
                types.add(token)
                struct = kind == "struct"
            if not macro:
                declaring = depth
            if not members[-1]:
                scopes[-1][token] = f"${count}"
                count += 1
        made.append(token if members[-1] and declared else scopes[-1].get(token, token))
    return made
