"""Tables of layers: what is read back, and the layers that are named."""

from __future__ import annotations

from qexp.report import layers

TABLE = b"""name,kind,int8,sqnr_db,own_sqnr_db,weight_sqnr_db,clipped,saturated,highest,narrowed,scale,kernel,reason
x,quantize,,40.0,9.0,,0.0,,,,0.1,,
conv1,conv,True,35.5,30.0,44.0,0.01,0.25,255,weights,0.1,x86 conv,
"a,b",conv,True,inf,26.0,44.0,0.0,,,,0.1,x86 conv,
conv2,conv,True,30.0,29.0,44.0,0.0,,,,0.1,x86 conv,
head,linear,False,20.0,,,0.0,,,,0.1,,not supported
fc,linear,True,21.0,31.0,44.0,0.0,,,,0.1,x86 linear,
"""


def test_a_table_is_read_with_what_it_lacks() -> None:
    rows = layers.read(TABLE)
    assert [row.name for row in rows] == ["x", "conv1", "a,b", "conv2", "head", "fc"]
    assert rows[1] == layers.LayerRow("conv1", "conv", True, 35.5, 30.0, 44.0, 0.01, 0.25)
    assert (rows[0].int8, rows[0].weight_sqnr_db, rows[2].sqnr_db) == (False, None, float("inf"))
    assert (rows[4].int8, rows[4].own_sqnr_db, rows[4].saturated) == (False, None, None)
    (old,) = layers.read(b"name,kind\nconv1,conv\n")  # as before errors were measured
    assert (old.int8, old.sqnr_db) == (False, None)
    assert layers.read(b"") == ()


def test_an_int8_layer_that_adds_twice_the_noise_of_the_median_is_to_be_kept() -> None:
    # The median of 26, 29, 30 and 31 is 29.5; `x`, which has the lowest, is no layer that could be kept.
    found = layers.compare(TABLE, TABLE.replace(b"35.5", b"5.5"))
    assert (found.keep, found.worst[1].sqnr_db) == (("a,b",), 5.5)
    assert layers.compare(TABLE.replace(b"26.0", b"27.0"), TABLE).keep == ()
    assert layers.compare(b"name,kind\nconv1,conv\n", TABLE).keep == ()


def test_the_noisiest_come_first_and_are_a_quarter_at_most() -> None:
    own = [30.0] * 6 + [10.0, 20.0, 5.0]
    rows = tuple(layers.LayerRow(str(n), "conv", True, None, db, None, None, None) for n, db in enumerate(own))
    assert layers.noisy(rows) == ("8", "6")
