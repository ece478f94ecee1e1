"""What MLflow raises, turned into one error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from cluster.registry_store import Store, without_credentials
from rl_actors.errors import InfrastructureError, SeatrialError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def reported(call: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Turn whatever MLflow raises into InfrastructureError: what was tried, what it said, what to do.

    For methods of objects with a `store`. MLflow lets SQLAlchemy's, requests' and its own errors through alike.
    """

    @wraps(call)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return call(*args, **kwargs)
        except SeatrialError:
            raise
        except Exception as error:
            store = getattr(args[0], "store", None)
            said = without_credentials(str(error).strip().partition("\n")[0]) or type(error).__name__
            remedy = store.remedy if isinstance(store, Store) else "check the MLflow store"
            raise InfrastructureError(f"MLflow, {call.__name__.strip('_')}: {said}; {remedy}") from error

    return guarded
