"""The canary of an upgrade: private names of TRL and transformers that the trainers rest on."""

import pytest
from trl import RLOOTrainer

from trainers.private_names import PRIVATE_NAMES, PrivateName


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda private: f"{private.owner.__name__}.{private.name}")
def test_the_library_still_has_it(private):
    if problem := private.problem():
        pytest.fail(problem)


@pytest.mark.parametrize("parameters, message", [(None, "it is gone"), (("a",), "it is gone")])
def test_a_name_that_is_gone_is_reported(parameters, message):
    problem = PrivateName(RLOOTrainer, "_never_there", "trainers/x.py", parameters).problem()
    assert problem == f"trl's RLOOTrainer._never_there changed: {message}, see trainers/x.py for what relies on it"


def test_other_parameters_are_reported():
    problem = PrivateName(RLOOTrainer, "_generate", "trainers/x.py", ("texts",)).problem()
    assert problem == (
        "trl's RLOOTrainer._generate changed: its parameters are ('prompts',) and were ('texts',), "
        "see trainers/x.py for what relies on it"
    )
