"""From the fields that constrain an output to the grammar that the engine is given."""

from ..grammar.constraint import Constraint, GrammarRefused, grammar_of
from .errors import InvalidRequest
from .output_format import ConstrainedBody
from .state import AppState


async def output_grammar(body: ConstrainedBody, state: AppState) -> str | None:
    """The grammar of the output, None where it may be any text.

    Raises:
        InvalidRequest: There is no such grammar, or it is not served; naming the field.
    """
    if body.constraint is None:
        return None
    where, constraint = body.constraint
    return await checked_grammar(where, constraint, state)


async def checked_grammar(where: str, constraint: Constraint, state: AppState) -> str:
    """The grammar of a constraint that came in the field ``where``, or in a field of that one.

    Raises:
        InvalidRequest: There is no such grammar, or it is not served.
    """
    try:
        grammar = grammar_of(constraint)
        await state.check_grammar(grammar)
    except GrammarRefused as error:
        param = where.partition(".")[0]
        raise InvalidRequest(f"{where}: this cannot be enforced: {error}.", param) from error
    return grammar
