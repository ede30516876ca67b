import pytest

from ppf import errors

KINDS = {
    errors.InputError: (2, ValueError),
    errors.UnsupportedError: (3, NotImplementedError),
    errors.DamagedError: (4, ValueError),
    errors.ResourceError: (5, OSError),
    errors.InUseError: (6, OSError),
}


@pytest.mark.parametrize(("kind", "code", "builtin"), [(kind, *rest) for kind, rest in KINDS.items()])
def test_each_error_has_its_exit_code_and_is_a_builtin(kind, code, builtin):
    error = kind("a must hold; b came; do c")
    assert isinstance(error, errors.PPFError) and isinstance(error, builtin)
    assert error.exit_code == code
    assert str(error) == "a must hold; b came; do c"


def test_exit_codes_tell_all_errors_apart():
    kinds = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.PPFError)}
    kinds -= {errors.NewerError}  # what a newer ppf made is no other case to a shell than what is damaged
    assert kinds == {errors.PPFError, *KINDS} and errors.NewerError.exit_code == errors.DamagedError.exit_code
    assert sorted(kind.exit_code for kind in kinds) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_every_message_is_one_line(kind):
    assert str(kind("a\nb\tc\x1b[1m; came; do")) == "a\\nb\\tc\\x1b[1m; came; do"
