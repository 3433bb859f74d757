# SPDX-License-Identifier: Apache-2.0
import pytest

from packager.report.links import LINKS, Link, link_records, lora_airtime_s


@pytest.mark.parametrize(
    ("payload", "factor", "milliseconds"),
    [
        # By hand from the datasheet's formula; 1.024 ms and 32.768 ms a symbol.
        (13, 7, 12.25 * 1.024 + (8 + 5 * 4) * 1.024),
        (64, 12, 12.25 * 32.768 + (8 + 5 * 13) * 32.768),
        (0, 12, 12.25 * 32.768 + 8 * 32.768),
    ],
)
def test_a_lora_frame_is_as_long_as_the_datasheet_says(payload, factor, milliseconds):
    assert lora_airtime_s(payload, factor) == pytest.approx(milliseconds / 1000)


def test_messages_are_whole_and_silence_is_counted():
    link = Link("test", "messages", 100, 2.0, 0.1, "")
    assert [link.messages(size) for size in (0, 1, 100, 101)] == [0, 1, 1, 2]
    assert link.seconds(101) == pytest.approx(40)
    assert link.payload_rate == pytest.approx(40)


def test_payload_rates_are_those_that_the_sources_give():
    rates = {link.name: link.payload_rate for link in LINKS}
    assert rates["NB-IoT"] == pytest.approx(26_000)
    assert rates["LTE-M"] == pytest.approx(300_000)
    # Before headers, frames and silence, LoRaWAN has 250 and 5,470 bit/s.
    assert 12 < rates["LoRa SF12"] < 250 * 0.1
    assert 400 < rates["LoRa SF7"] < 5470 * 0.1


def test_a_record_holds_a_patch_against_the_full_weights():
    for record in link_records(1000, 1_000_000):
        assert 0 < record["seconds"] < record["full_seconds"]
        assert record["messages"] <= record["full_messages"]
