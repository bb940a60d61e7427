"""What can be said at each level of the compiler, its text form and its verifier; no opinion about speed.

`expr` holds integer expressions, `ranges` the values they can take, `text` the reader that all text forms share, `node`
the interned operations; `pattern`, `tiles` and `kernel` are the three levels, in lowering order.
"""
