"""The ladder: that one form computes what another does.

In: two forms of a program. Out: rungs with their largest differences, or a `VerificationError`.
May run forms; changes nothing.
"""
