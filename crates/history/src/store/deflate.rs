//! Compresses and decompresses objects in memory. Each thread keeps the state of the library, since creating it
//! costs more than most objects.

use std::cell::RefCell;
use std::io;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// The compression level.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Effort {
    /// For callers that wait.
    Fast,
    /// For background work.
    Thorough,
}

/// Appends content as a zlib stream of stored blocks (RFC 1950, RFC 1951): for content that hardly shrinks,
/// such as trees, half of which are hashes.
pub(crate) fn store(content: &[u8], out: &mut Vec<u8>) {
    /// The largest length of a block, which has 16 bits.
    const BLOCK: usize = 65_535;
    out.reserve(content.len() + content.len() / BLOCK * 5 + 11);
    // Method 8, window of 32 KiB, fastest level; the two bytes are a multiple of 31.
    out.extend_from_slice(&[0x78, 0x01]);
    let mut rest = content;
    loop {
        let (block, more) = rest.split_at(rest.len().min(BLOCK));
        let length = block.len() as u16;
        out.push(u8::from(more.is_empty()));
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&(!length).to_le_bytes());
        out.extend_from_slice(block);
        if more.is_empty() {
            break;
        }
        rest = more;
    }
    out.extend_from_slice(&zlib_rs::adler32::adler32(1, content).to_be_bytes());
}

thread_local! {
    static FAST: RefCell<Option<Compress>> = const { RefCell::new(None) };
    static THOROUGH: RefCell<Option<Compress>> = const { RefCell::new(None) };
}

/// Appends content as one zlib stream.
///
/// # Errors
/// Fails only if the library does.
pub(crate) fn deflate(content: &[u8], effort: Effort, out: &mut Vec<u8>) -> io::Result<()> {
    let (cell, level) = match effort {
        Effort::Fast => (&FAST, Compression::fast()),
        Effort::Thorough => (&THOROUGH, Compression::default()),
    };
    cell.with_borrow_mut(|state| {
        let state = state.get_or_insert_with(|| Compress::new(level, true));
        state.reset();
        // Most text shrinks to about a third.
        out.reserve(content.len() / 3 + 64);
        loop {
            if out.len() == out.capacity() {
                out.reserve(content.len() / 2 + 64);
            }
            let rest = &content[state.total_in() as usize..];
            match state.compress_vec(rest, out, FlushCompress::Finish).map_err(io::Error::other)? {
                Status::StreamEnd => return Ok(()),
                Status::Ok | Status::BufError => {}
            }
        }
    })
}

/// The state of decompression.
struct Inflation {
    state: Decompress,
    /// Compressed bytes that were read.
    read: Vec<u8>,
}

thread_local! {
    static INFLATION: RefCell<Option<Box<Inflation>>> = const { RefCell::new(None) };
}

/// Decompresses a zlib stream whose content has `size` bytes. `read_at` reads bytes at an offset from the start
/// of the stream.
///
/// # Errors
/// Fails when the stream cannot be read, is damaged, or has content of another size.
pub(crate) fn inflate(size: u64, read_at: impl Fn(&mut [u8], u64) -> io::Result<usize>) -> io::Result<Vec<u8>> {
    let bad = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
    INFLATION.with_borrow_mut(|inflation| {
        let Inflation { state, read } = &mut **inflation
            .get_or_insert_with(|| Box::new(Inflation { state: Decompress::new(true), read: vec![0; 32 * 1024] }));
        state.reset(true);
        let mut content = Vec::with_capacity(size.min(64 << 20) as usize);
        let (mut at, mut have) = (0, 0..0);
        loop {
            if have.is_empty() {
                // Most objects are small; reading more would only copy it.
                let wanted = if size < 8 * 1024 { 4096 } else { read.len() };
                have = 0..read_at(&mut read[..wanted], at)?;
                at += have.len() as u64;
                if have.is_empty() {
                    return Err(bad("its compressed content ends too early".to_owned()));
                }
            }
            if content.len() == content.capacity() {
                // One byte more than `size` suffices to detect that the content is too long.
                content.reserve(if content.len() as u64 >= size { 1 } else { 64 * 1024 });
            }
            let before = (state.total_in(), state.total_out());
            let status = state.decompress_vec(&read[have.clone()], &mut content, FlushDecompress::None);
            let status = status.map_err(|error| bad(error.to_string()))?;
            have.start += (state.total_in() - before.0) as usize;
            if status != Status::StreamEnd && before == (state.total_in(), state.total_out()) {
                return Err(bad("its compressed content is damaged".to_owned()));
            }
            if status == Status::StreamEnd || content.len() as u64 > size {
                break;
            }
        }
        if content.len() as u64 == size {
            Ok(content)
        } else {
            Err(bad(format!("expected {size} bytes, decompressed {}", content.len())))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use sha1::{Digest, Sha1};

    use super::*;

    fn inflated(zlib: &[u8]) -> Vec<u8> {
        let mut back = Vec::new();
        flate2::read::ZlibDecoder::new(zlib).read_to_end(&mut back).unwrap();
        back
    }

    #[test]
    fn stored_content_is_decompressed_unchanged() {
        for length in [0, 1, 1000, 65_534, 65_535, 65_536, 131_070, 300_000] {
            let content: Vec<u8> = (0..length).map(|n| (n * 7 / 3) as u8).collect();
            let mut out = b"head".to_vec();
            store(&content, &mut out);
            assert!(inflated(&out[4..]) == content, "{length}");
        }
    }

    #[test]
    fn compressed_content_is_decompressed_unchanged() {
        let noise: Vec<u8> = (0..15_000_u32).flat_map(|n| Sha1::digest(n.to_le_bytes())).collect();
        for content in [&b""[..], b"a", &[7; 100_000], &noise] {
            for effort in [Effort::Fast, Effort::Thorough] {
                let mut out = b"head".to_vec();
                deflate(content, effort, &mut out).unwrap();
                assert!(inflated(&out[4..]) == content);
                let read_at = |buffer: &mut [u8], at: u64| (&out[(4 + at as usize).min(out.len())..]).read(buffer);
                assert!(inflate(content.len() as u64, read_at).unwrap() == content);
                for promised in [content.len() + 1].into_iter().chain(content.len().checked_sub(1)) {
                    let error = inflate(promised as u64, read_at).unwrap_err().to_string();
                    assert_eq!(error, format!("expected {promised} bytes, decompressed {}", content.len()));
                }
            }
        }
    }
}
