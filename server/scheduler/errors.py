"""Why the scheduler refuses a sequence, and what it raises when its books do not balance.

SequenceRefused          the sequence cannot be run; the others go on
└── SequenceTooLong      its tokens exceed what the model or the cache can hold
AccountingError          a defect: sequences are in two places or in none
└── KVAccountingError    a defect: blocks are leaked, shared wrongly or findable under a wrong hash
"""


class SequenceRefused(Exception):
    """A sequence that will not be scheduled. The message says what was wrong and what to do."""


class SequenceTooLong(SequenceRefused):
    """The sequence leaves no room for one more token."""


class AccountingError(Exception):
    """The scheduler's books do not balance: a defect, never the fault of a request."""


class KVAccountingError(AccountingError):
    """The books of the KV cache do not balance."""
