"""Packages that do not fit together are refused before they fail in a puzzling way."""

from importlib import metadata

import pytest

from expert_iteration.errors import UserError
from expert_iteration.installation import check_installation


@pytest.fixture
def install(monkeypatch):
    """A function that makes exactly these versions installed."""

    def version_of(versions, name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    return lambda **versions: monkeypatch.setattr(metadata, "version", lambda name: version_of(versions, name))


def test_a_torchvision_of_another_build_is_refused_with_the_remedy(install):
    install(torch="2.13.0+cpu", torchvision="0.28.0", torchaudio="2.13.0+cpu")
    with pytest.raises(UserError, match=r"torchvision was built .* pip uninstall --yes torchvision$"):
        check_installation()


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.13.0+cpu"},
        {"torch": "2.13.0", "torchvision": "0.28.0"},
        {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"},
    ],
)
def test_what_fits_passes(install, versions):
    install(**versions)
    check_installation()


def test_what_is_installed_here_fits():
    check_installation()
