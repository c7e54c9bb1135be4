//! Durations, sizes, times and amounts as text: parsed from the command line, formatted for people.

use std::time::{Duration, SystemTime};

use fermata_protocol::UnixMillis;
use jiff::Timestamp;
use jiff::tz::TimeZone;

pub fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixMillis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Parses `10s`, `1h30m`, `250ms`, `0.2s`, `2d`; a bare number means seconds.
///
/// # Errors
/// A sentence that says what is wrong with the text.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("'{text}' is not a duration, such as 500ms, 10s, 2m or 1h30m");
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().map_err(|_| invalid())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "" if rest.is_empty() && digits == text.trim().len() => 1.0,
            "ms" => 0.001,
            "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3_600.0,
            "d" => 86_400.0,
            _ => return Err(invalid()),
        };
        rest = &rest[letters..];
        seconds += number * unit;
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| invalid())
}

/// Returns a duration in whole milliseconds, as the protocol wants it.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Parses a point in time: `10m` (that long ago) or RFC 3339.
///
/// # Errors
/// A sentence that says what is wrong with the text.
pub fn parse_since(text: &str, now: UnixMillis) -> Result<UnixMillis, String> {
    if let Ok(ago) = parse_duration(text) {
        let ago = i64::try_from(millis(ago)).unwrap_or(i64::MAX);
        return Ok(UnixMillis(now.0.saturating_sub(ago)));
    }
    text.parse::<Timestamp>()
        .map(|at| UnixMillis(at.as_millisecond()))
        .map_err(|_| format!("'{text}' is not a time, such as 10m (ago) or {}", rfc3339(now)))
}

/// Parses a size in bytes: `512MiB`, `10M`, `1.5G`, `4096`. Units count by 1,024.
///
/// # Errors
/// A sentence that says what is wrong with the text.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let invalid = || format!("'{text}' is not a size, such as 4096, 64KiB, 1.5G or 512MiB");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let shift = match text[digits..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(invalid()),
    };
    let (whole, fraction) = text[..digits].split_once('.').map_or((&text[..digits], None), |(w, f)| (w, Some(f)));
    let bytes = whole.parse::<u64>().ok().and_then(|whole| whole.checked_mul(1 << shift)).ok_or_else(invalid)?;
    let Some(fraction) = fraction else { return Ok(bytes) };
    // Nine digits are finer than a byte of a gigabyte; half a byte is none.
    if shift == 0 || fraction.is_empty() || fraction.len() > 9 || fraction.contains('.') {
        return Err(invalid());
    }
    let parts: u128 = fraction.parse().map_err(|_| invalid())?;
    let more = (parts << shift) / 10_u128.pow(fraction.len() as u32);
    u64::try_from(more).ok().and_then(|more| bytes.checked_add(more)).ok_or_else(invalid)
}

/// Formats how long ago a time was: `3m ago`.
pub fn ago(at: UnixMillis, now: UnixMillis) -> String {
    let ms = now.since(at);
    if ms < 1_000 { "just now".into() } else { format!("{} ago", coarse(ms)) }
}

/// Formats the time left until a point in time: `now`, `in 8s`, `in 3m`.
pub fn until(at: UnixMillis, now: UnixMillis) -> String {
    let ms = at.since(now);
    if ms < 1_000 { "now".into() } else { format!("in {}", coarse(ms)) }
}

/// Formats a duration in its largest unit: `3m`, `2d`.
fn coarse(ms: i64) -> String {
    let seconds = ms / 1_000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Formats a duration in milliseconds: `0.4 ms`, `12 ms`, `1.2 s`, `3m 20s`, `2h`.
pub fn duration(ms: f64) -> String {
    if ms < 10.0 {
        return format!("{:.1} ms", ms.max(0.0));
    }
    if ms < 1_000.0 {
        return format!("{ms:.0} ms");
    }
    if ms < 60_000.0 {
        return format!("{:.1} s", ms / 1_000.0);
    }
    // Truncated on purpose: the parts are whole units.
    let seconds = (ms / 1_000.0) as i64;
    let (large, small) = match seconds {
        ..3_600 => ((seconds / 60, "m"), (seconds % 60, "s")),
        3_600..172_800 => ((seconds / 3_600, "h"), (seconds % 3_600 / 60, "m")),
        _ => ((seconds / 86_400, "d"), (seconds % 86_400 / 3_600, "h")),
    };
    match small {
        (0, _) => format!("{}{}", large.0, large.1),
        (count, unit) => format!("{}{} {count}{unit}", large.0, large.1),
    }
}

/// Formats an estimate of the time left: `about 3m left`; `None` when it is less than a second.
pub fn time_left(ms: i64) -> Option<String> {
    (ms >= 1_000).then(|| format!("about {} left", coarse(ms)))
}

/// Formats a count with its noun, which gets an `s` unless the count is 1: `1 file`, `2,000 files`.
pub fn counted(count: u64, noun: &str) -> String {
    format!("{} {noun}{}", number(count), if count == 1 { "" } else { "s" })
}

/// Formats bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Formats a size: `900 B`, `4.0 KiB`, `1.2 GiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1_024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1_024.0;
    let mut unit = 0;
    // 1023.95 would be written as 1024.0.
    while value >= 1_023.95 && unit + 1 < UNITS.len() {
        value /= 1_024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Formats a number with its thousands grouped: `180,000`.
pub fn number(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Formats millionths of a US dollar.
pub fn dollars(micro_usd: u64) -> String {
    format!("${:.2}", micro_usd as f64 / 1e6)
}

/// Formats a point in time in the local time zone.
pub fn local(at: UnixMillis) -> String {
    match Timestamp::from_millisecond(at.0) {
        Ok(at) => at.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => at.0.to_string(),
    }
}

/// Formats a point in time, in nanoseconds since the epoch, as RFC 3339 in UTC with milliseconds.
pub fn rfc3339_ns(at_ns: i64) -> String {
    match Timestamp::from_nanosecond(i128::from(at_ns)) {
        Ok(at) => format!("{at:.3}"),
        Err(_) => at_ns.to_string(),
    }
}

fn rfc3339(at: UnixMillis) -> String {
    match Timestamp::from_millisecond(at.0) {
        Ok(at) => format!("{at:.0}"),
        Err(_) => at.0.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_in_every_unit() {
        for (text, ms) in [
            ("10s", 10_000),
            ("10", 10_000),
            ("0.2s", 200),
            ("250ms", 250),
            ("2m", 120_000),
            ("1h30m", 5_400_000),
            ("1d", 86_400_000),
            ("0", 0),
        ] {
            assert_eq!(parse_duration(text).map(millis), Ok(ms), "{text}");
        }
        for bad in ["", "soon", "10x", "s", "1h30", "-5s", "1..2s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn since_takes_a_duration_or_a_timestamp() {
        let now = UnixMillis(1_000_000);
        assert_eq!(parse_since("10m", now), Ok(UnixMillis(400_000)));
        assert_eq!(parse_since("1970-01-01T00:01:00Z", now), Ok(UnixMillis(60_000)));
        assert!(parse_since("yesterday", now).is_err());
    }

    #[test]
    fn sizes_are_read_and_written() {
        assert_eq!(parse_bytes("512MiB"), Ok(512 << 20));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("1.5G"), Ok(3 << 29));
        assert_eq!(parse_bytes("0.001k"), Ok(1));
        for bad in ["", ".5G", "1.G", "1.5", "1.5.1G", "1.0000000001G", "-1", "1 G"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert!(parse_bytes("99999999999T").is_err() && parse_bytes("ten").is_err());
        assert_eq!(bytes(900), "900 B");
        assert_eq!(bytes(4_096), "4.0 KiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
    }

    #[test]
    fn times_are_written_for_people() {
        let now = UnixMillis(10_000_000);
        assert_eq!(ago(UnixMillis(10_000_000 - 190_000), now), "3m ago");
        assert_eq!(ago(now, now), "just now");
        assert_eq!(duration(0.42), "0.4 ms");
        assert_eq!(duration(1_234.0), "1.2 s");
        assert_eq!(duration(200_000.0), "3m 20s");
        assert_eq!((duration(120_000.0), duration(7_260_000.0)), ("2m".into(), "2h 1m".into()));
        assert_eq!((time_left(322), time_left(200_000)), (None, Some("about 3m left".into())));
        assert_eq!((counted(1, "file"), counted(2_000, "file")), ("1 file".into(), "2,000 files".into()));
        assert_eq!(number(1_234_567), "1,234,567");
        assert_eq!(rfc3339_ns(1_500_000_000), "1970-01-01T00:00:01.500Z");
    }
}
