# SPDX-License-Identifier: Apache-2.0
"""How long a patch takes on common thin links.

Downlink to one device, nothing lost, nobody else on the air: the best case, so that two
patches can be compared. Every constant has its source beside it. A broadcast (LoRaWAN
class C multicast) takes as long as one device; lost fragments come on top.
"""

import math
from dataclasses import dataclass

from packager.report.records import LinkRecord

# LoRaWAN frame around the application payload, bytes: MHDR 1, FHDR 7, FPort 1, MIC 4
# (LoRaWAN L2 1.0.4 specification, section 4).
LORAWAN_OVERHEAD_BYTES = 13
# Fragment header, bytes: command 1, index 2 (LoRa Alliance TS004-2.0.0, section 3.6,
# which calls a payload's room MaxAppPl - 3).
FRAGMENT_HEADER_BYTES = 3
# Largest application payload without repeaters, bytes: EU863-870 DR0 and DR5 (LoRaWAN
# Regional Parameters, table "maximum payload size, not repeater compatible").
SF12_PAYLOAD_BYTES, SF7_PAYLOAD_BYTES = 51, 242
# 869.40 to 869.65 MHz, where class C downlinks go by default (869.525 MHz): the sender
# may be on the air 10 % of the time (ETSI EN 300 220-2 V3.2.1, band P). The other
# sub-bands allow 1 % or 0.1 %.
EU868_DUTY_CYCLE = 0.1


def lora_airtime_s(payload_bytes: int, spreading_factor: int) -> float:
    """Return how long one LoRa frame is on the air, in seconds.

    As in section 4.1.1.7 of the Semtech SX1276 datasheet, for a LoRaWAN downlink: 125
    kHz, coding rate 4/5, 8 preamble symbols, explicit header, no payload checksum, low
    data rate optimisation from SF11 on (symbols of 16 ms and more).

    Args:
        payload_bytes: Everything after the LoRa header, LoRaWAN's own bytes included.
        spreading_factor: 7 to 12.
    """
    symbol_s: float = 2**spreading_factor / 125_000
    slow = spreading_factor >= 11
    bits = 8 * payload_bytes - 4 * spreading_factor + 28
    groups = math.ceil(max(bits, 0) / (4 * (spreading_factor - 2 * slow)))
    return (8 + 4.25 + 8 + groups * 5) * symbol_s


@dataclass(frozen=True, slots=True)
class Link:
    """One kind of link, as a device's downlink sees it.

    Attributes:
        name: What people call it.
        unit: What one message is called there.
        message_bytes: Bytes of a patch that one message carries.
        message_s: Seconds that one message takes.
        duty_cycle: Share of the time that the sender may use.
        note: What the numbers assume.
    """

    name: str
    unit: str
    message_bytes: int
    message_s: float
    duty_cycle: float
    note: str

    @property
    def payload_rate(self) -> float:
        """Bits of a patch a second, in the long run."""
        return 8 * self.message_bytes / self.message_s * self.duty_cycle

    def messages(self, size: int) -> int:
        """Return how many messages carry ``size`` bytes."""
        return -(-size // self.message_bytes)

    def seconds(self, size: int) -> float:
        """Return how long ``size`` bytes take, the enforced silence included."""
        return self.messages(size) * self.message_s / self.duty_cycle


def _lorawan(name: str, spreading_factor: int, payload_bytes: int) -> Link:
    return Link(
        name,
        "frames",
        payload_bytes - FRAGMENT_HEADER_BYTES,
        lora_airtime_s(payload_bytes + LORAWAN_OVERHEAD_BYTES, spreading_factor),
        EU868_DUTY_CYCLE,
        f"LoRaWAN EU868, 10 % duty cycle, {payload_bytes}-byte payloads",
    )


LINKS = (
    _lorawan("LoRa SF12", 12, SF12_PAYLOAD_BYTES),
    _lorawan("LoRa SF7", 7, SF7_PAYLOAD_BYTES),
    # A 9602 or 9603 modem takes mobile-terminated messages of up to 270 bytes (so their
    # common drivers, such as IridiumSBD, state: 270 received, 340 sent). Delivery takes
    # about 5 s for a short message and 20 s for one of 1,960 bytes (NAL Research,
    # "Short Burst Data"), so some 7 s for 270, with a good view of the sky.
    Link("Satellite SBD", "messages", 270, 7.0, 1.0, "Iridium 9602 or 9603, clear sky"),
    # Cat-NB1 (3GPP Release 13): blocks of at most 680 bits; with the waits between
    # control, data and acknowledgement 26 kbit/s at most. Repetitions at the edge of a
    # cell divide that by up to 2,048.
    Link("NB-IoT", "blocks", 85, 680 / 26_000, 1.0, "Cat-NB1, best coverage"),
    # Cat-M1 (Release 13): blocks of at most 1,000 bits, 300 kbit/s down in half duplex
    # with its scheduling (800 in full duplex).
    Link("LTE-M", "blocks", 125, 1_000 / 300_000, 1.0, "Cat-M1, half duplex"),
)


def link_records(size: int, full_size: int) -> list[LinkRecord]:
    """Say for every link how long a patch and the full weights take.

    Args:
        size: Bytes of the patch.
        full_size: Bytes of the weight file.
    """
    return [
        {
            "name": link.name,
            "unit": link.unit,
            "note": link.note,
            "payload_bits_per_s": link.payload_rate,
            "duty_cycle": link.duty_cycle,
            "messages": link.messages(size),
            "seconds": link.seconds(size),
            "full_messages": link.messages(full_size),
            "full_seconds": link.seconds(full_size),
        }
        for link in LINKS
    ]
