"""How an exercise is handed out and graded: stubs, the list, a student's file, and messages that help.

An exercise is a right answer in plain loops, cases to compare on, and wrong answers; data/exercises.py is the table of
them. An answer stands in the reference's place while it is graded, so it cannot pass by calling that.
"""
import ast
import contextlib
import copy
import doctest
import inspect
import signal
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

EXERCISES = {}                                                 # name: Exercise, in the order of the list


class Wrong(AssertionError):
    """The answer runs, and is not right."""


class Broken(AssertionError):
    """The answer cannot be judged: it does not load, is not written yet, raises, or does not end."""


class TooSlow(BaseException):
    """Time is up. Not an Exception, so that `except Exception` in an answer does not swallow it."""


@dataclass
class Exercise:
    owner: Any                                                 # the module or class that holds the reference
    attribute: str
    difficulty: int                                            # 1, easy, to 3
    minutes: int
    check: Callable                                            # check(answer) raises Wrong
    wrong: dict                                                # label: a wrong answer

    @property
    def reference(self):
        return inspect.unwrap(vars(self.owner)[self.attribute])


def require(condition, message):
    if not condition:
        raise Wrong(message)


# --- Entering an exercise --------------------------------------------------------------------------------------------
def exercise(owner, difficulty, minutes, cases, wrong, first=None, compare=None):
    """Enter the right answer below it, which bears the reference's name, into EXERCISES.

    cases() → [(what, *arguments)]; first(found, *arguments) looks for plain mistakes before the values are compared, by
    compare(found, expected) or else by agree. wrong: label → (text, text in its place), a change to the right answer,
    or a whole function.
    """
    def add(right):
        def check(answer):
            for what, *arguments in cases():
                tensors = [a for a in arguments if isinstance(a, (torch.Tensor, np.ndarray))]
                kept, text = copy.deepcopy(tensors), ", ".join(map(text_of, arguments))
                try:
                    found, expected = answer(*arguments), right(*arguments)
                    kind = kind_of(expected)
                    require(kind_of(found) == kind, f"The result must be {kind}, not {kind_of(found)}")
                    require(all((a == b).all() for a, b in zip(tensors, kept)), "The arguments have changed")
                    if first:
                        first(found, *arguments)
                    (compare or agree)(found, expected)
                    if any(getattr(a, "requires_grad", False) for a in tensors):
                        require(found.requires_grad, "The value is right, but no gradient flows back from it")
                except Wrong as error:
                    raise Wrong(f"{error}\nCase: {what}" + f"; arguments {text}" * (len(text) < 200)) from None
        source = textwrap.dedent(inspect.getsource(right))
        source = source[source.index(f"def {right.__name__}("):]   # without the decorator
        answers = {label: change if callable(change) else changed(right, source, *change) for label, change in wrong.items()}
        name = f"{owner.__name__}.{right.__name__}" if inspect.isclass(owner) else right.__name__
        EXERCISES[name] = Exercise(owner, right.__name__, difficulty, minutes, check, answers)
        return right
    return add


def changed(right, source, old, new):
    """The right answer with one piece of its text changed."""
    assert source.count(old) == 1, f"{right.__name__}: {old!r} stands {source.count(old)} times in the right answer"
    namespace = dict(right.__globals__)
    exec(source.replace(old, new), namespace)
    return namespace[right.__name__]


def text_of(x):
    """An argument as short text."""
    if isinstance(x, (torch.Tensor, np.ndarray)):
        x = x.detach().numpy() if isinstance(x, torch.Tensor) else x
        return " ".join(np.array2string(x, precision=3, separator=", ", suppress_small=True).split())
    return repr(x) if isinstance(x, (int, float, list)) else f"<{type(x).__name__}>"


def kind_of(x):
    """What a result is, in words: its type, the type of its entries, and their shape."""
    if isinstance(x, tuple):
        return "a tuple of " + " and ".join(map(kind_of, x))
    if not isinstance(x, (torch.Tensor, np.ndarray)):
        return f"a {type(x).__name__}"
    entries = str(x.dtype).removeprefix("torch.").rstrip("0123456789")           # float32 is as good as float64
    return f"a {'torch tensor' if isinstance(x, torch.Tensor) else 'numpy array'} of {entries}, shape {tuple(x.shape)}"


def agree(found, expected):
    """Equal values; the message names the first place that differs."""
    for i, (f, e) in enumerate(zip(found, expected) if isinstance(found, tuple) else [(found, expected)]):
        f, e = torch.as_tensor(f).detach(), torch.as_tensor(e).detach()
        bad = ~torch.isclose(f.double(), e.double(), rtol=1e-4, atol=1e-5)
        if bad.any():
            place = tuple(bad.nonzero()[0].tolist())
            at = f" at {list(place)}" * bool(place) + f" of result {i + 1}" * isinstance(found, tuple)
            f, e = (x if isinstance(x, bool) else round(x, 6) for x in (f[place].item(), e[place].item()))
            raise Wrong(f"Found {f}{at}, expected {e}")


# --- Handing out -----------------------------------------------------------------------------------------------------
def stub(name):
    """The text of a file with the imports of the reference and of its examples, its signature and docstring; no body."""
    function = EXERCISES[name].reference
    module = inspect.getmodule(function)
    source = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(source).body[0]
    examples = ast.parse("".join(example.source for example in doctest.DocTestParser().get_examples(ast.get_docstring(tree))))
    nodes = [*ast.walk(tree), *ast.walk(examples)]
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)} - {function.__name__}
    imports = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in used]
            used -= {alias.asname or alias.name for alias in node.names}
            imports += [ast.unparse(node)] if node.names else []
    own = sorted(used & set(vars(module)))                     # constants and helpers of the module itself
    imports += [f"from {module.__name__} import {', '.join(own)}"] if own else []
    head = source.splitlines()[:tree.body[0].end_lineno]       # up to the end of the docstring
    return "\n".join([f"# Grade it: MINE=mine.py python -m pytest -q test_gflowgr.py -k {name}", *imports, "", "", *head,
                      '    raise NotImplementedError("your turn")', ""])


def listing():
    """A line for each exercise, the easy ones first, and how to go on."""
    exercises = sorted(EXERCISES.items(), key=lambda entry: (entry[1].difficulty, entry[1].minutes))
    return "\n".join([f"{'name':28}{'difficulty':12}{'minutes':9}file"]
                     + [f"{name:28}{'*' * e.difficulty:12}{e.minutes:<9}{inspect.getmodule(e.reference).__name__.replace('.', '/')}.py"
                        for name, e in exercises]
                     + ["", "python test_gflowgr.py --stub NAME > mine.py, write the body, then",
                        "MINE=mine.py python -m pytest -q test_gflowgr.py -k NAME", ""])


# --- Grading ---------------------------------------------------------------------------------------------------------
def grade(name, answer=None, seconds=5):
    """Raise Wrong or Broken, with a message for the student, unless the answer is right.

    answer: a file's path, a function, or None for the reference.
    """
    e = EXERCISES[name]
    reference = vars(e.owner)[e.attribute]
    try:
        with time_limit(seconds), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            function = reference if answer is None else answer if callable(answer) else load(answer, e.attribute)
            guarded = guard(function, name)
            setattr(e.owner, e.attribute, guarded)
            e.check(guarded)
    except TooSlow:
        raise Broken(f"{name} had not ended after {seconds} seconds: does a loop go on for ever?") from None
    except Wrong as error:
        raise Wrong(f"{name} is not right yet. {error}") from None
    finally:
        setattr(e.owner, e.attribute, reference)


def load(path, attribute):
    """The function of this name in a student's file."""
    namespace = {"__name__": "mine", "__file__": str(path)}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), str(path), "exec"), namespace)
    except SyntaxError as error:
        raise Broken(f"{path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise Broken(f"{path} cannot be loaded: {type(error).__name__}: {error}") from None
    function = namespace.get(attribute)
    if not inspect.isfunction(function) or inspect.unwrap(function).__code__.co_filename != str(path):   # or imports one
        raise Broken(f"{path} defines no function {attribute}")
    return function


def guard(function, name):
    """The same function; what it raises becomes Broken, with the line."""
    file = inspect.unwrap(function).__code__.co_filename

    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except NotImplementedError:
            raise Broken(f"{name} is not yet written: it raises NotImplementedError") from None
        except (Exception, SystemExit) as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
            at = "".join(f" ({file}, line {line})" for line in lines[-1:])
            raise Broken(f"{name} raised {type(error).__name__}: {error}{at}") from None
    return call


@contextlib.contextmanager
def time_limit(seconds):
    """TooSlow after so many seconds: an alarm, since a thread could not be stopped and a process would load torch anew."""
    def stop(*_):
        raise TooSlow
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
