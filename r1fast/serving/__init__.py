"""An OpenAI-compatible server on the sampler: python -m r1fast.serve.

protocol.py    what a request may say, and what of OpenAI's interface has no effect or is refused
engine.py      the thread that drives the sampler: requests of all clients in one batch, cancelled when a client leaves
answers.py     what has been drawn, as text and log-probabilities, whole or piece by piece
app.py         the routes, the limits, errors in OpenAI's form
"""
