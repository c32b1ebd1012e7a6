def draw(r): return b""
def tables(r,d): return d
