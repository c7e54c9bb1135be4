//! The header of a pack entry: the kind and size of an object, and how it is stored. Encoding and decoding
//! only.

use std::io;

use crate::store::oid::{ObjectKind, Oid};

/// The longest header in bytes.
pub(crate) const MAX_HEADER: usize = 32;

/// How an object is stored in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Completely.
    Complete(ObjectKind),
    /// As a delta to the entry that begins this many bytes before this one.
    DeltaAt(u64),
    /// As a delta to this object in the same pack.
    DeltaTo(Oid),
}

/// The header of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryHeader {
    pub stored: Stored,
    /// The decompressed size of the object or of the delta.
    pub size: u64,
    /// The length of the header in bytes.
    pub length: usize,
}

/// Encodes type and size (four bits of the size beside the type, then seven per byte, low bits first), then the
/// base.
pub(crate) fn encode_header(stored: Stored, size: u64) -> Vec<u8> {
    let number = match stored {
        Stored::Complete(ObjectKind::Commit) => 1,
        Stored::Complete(ObjectKind::Tree) => 2,
        Stored::Complete(ObjectKind::Blob) => 3,
        Stored::DeltaAt(_) => 6,
        Stored::DeltaTo(_) => 7,
    };
    let mut bytes = vec![(number << 4) | (size & 0x0f) as u8];
    let mut rest = size >> 4;
    while rest > 0 {
        if let Some(last) = bytes.last_mut() {
            *last |= 0x80;
        }
        bytes.push((rest & 0x7f) as u8);
        rest >>= 7;
    }
    match stored {
        Stored::Complete(_) => {}
        Stored::DeltaAt(distance) => {
            // High bits first; each continuation adds one to the distance.
            let mut reversed = vec![(distance & 0x7f) as u8];
            let mut rest = distance >> 7;
            while rest > 0 {
                rest -= 1;
                reversed.push((rest & 0x7f) as u8 | 0x80);
                rest >>= 7;
            }
            bytes.extend(reversed.into_iter().rev());
        }
        Stored::DeltaTo(base) => bytes.extend_from_slice(base.raw()),
    }
    bytes
}

/// Decodes a header from the first bytes of an entry.
///
/// # Errors
/// Fails when the header is truncated or of an unknown type.
pub(crate) fn decode_header(bytes: &[u8]) -> io::Result<EntryHeader> {
    let mut at = 0;
    let mut next = || {
        let byte = bytes.get(at).copied().ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof));
        at += 1;
        byte
    };
    let first = next()?;
    let mut byte = first;
    let mut size = u64::from(byte & 0x0f);
    let mut shift = 4;
    while byte & 0x80 != 0 {
        byte = next()?;
        size |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        shift += 7;
    }
    let stored = match (first >> 4) & 7 {
        1 => Stored::Complete(ObjectKind::Commit),
        2 => Stored::Complete(ObjectKind::Tree),
        3 => Stored::Complete(ObjectKind::Blob),
        6 => {
            let mut byte = next()?;
            let mut distance = u64::from(byte & 0x7f);
            while byte & 0x80 != 0 {
                byte = next()?;
                let more = distance.checked_add(1).and_then(|d| d.checked_mul(128));
                distance = more.ok_or_else(|| bad("its delta base is outside of the pack".to_owned()))?
                    | u64::from(byte & 0x7f);
            }
            Stored::DeltaAt(distance)
        }
        7 => {
            let mut raw = [0; 20];
            for byte in &mut raw {
                *byte = next()?;
            }
            Stored::DeltaTo(Oid::from_raw(raw))
        }
        other => return Err(bad(format!("its pack entry has the unknown type {other}"))),
    };
    Ok(EntryHeader { stored, size, length: at })
}

/// Returns an error for invalid data.
pub(crate) fn bad(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_header_is_decoded_as_it_was_encoded() {
        let oid = Oid::of(ObjectKind::Blob, b"x");
        let sizes = [0, 1, 15, 16, 2047, 2048, 1 << 31, u64::MAX >> 4];
        let distances = [1, 127, 128, 129, 16_511, 16_512, 2_113_663, 2_113_664, 1 << 40];
        let kinds = [ObjectKind::Commit, ObjectKind::Tree, ObjectKind::Blob].map(Stored::Complete);
        let stored = kinds.into_iter().chain(distances.map(Stored::DeltaAt)).chain([Stored::DeltaTo(oid)]);
        for stored in stored {
            for size in sizes {
                let bytes = encode_header(stored, size);
                assert!(bytes.len() <= MAX_HEADER);
                assert_eq!(decode_header(&bytes).unwrap(), EntryHeader { stored, size, length: bytes.len() });
                assert!(decode_header(&bytes[..bytes.len() - 1]).is_err());
            }
        }
    }
}
