"""This engine with a digest of every step recorded: the proof that a run went as another one did."""

from competitors import engine


class Integrate(engine.Integrate):
    replay = "digest"


class Walk(engine.Walk):
    replay = "digest"


class Sir(engine.Sir):
    replay = "digest"
