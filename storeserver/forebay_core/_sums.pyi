from forebay_core.checksums import U64Array
from forebay_core.units import Buffer

def sum_blocks(blocks: Buffer, sums: U64Array, /) -> None: ...
