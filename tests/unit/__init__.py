import pytest

# Shared tests in a file whose name pytest does not know: without this, their failures would show no values.
pytest.register_assert_rewrite("tests.unit.model_contract")
