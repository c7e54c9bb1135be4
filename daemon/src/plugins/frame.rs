//! The frames between the daemon and a plugin host: a length (u32, little endian), then JSON.
//!
//! The types of both directions and two codecs: a blocking one for the host and a cancel-safe one for the daemon. The
//! daemon does not trust the host: a length over the limit or a body that is no frame ends the connection.

use fermata_plugin_api::{CallError, Description};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use std::io::{self, Read, Write};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest body of a frame, in bytes.
pub const MAX_FRAME: usize = 16 * 1024 * 1024;

/// A frame from the daemon to the host.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToHost {
    /// Calls a method of the plugin.
    Call {
        /// Rises from call to call.
        id: u64,
        method: String,
        params: Value,
        /// Milliseconds until the daemon cancels the call.
        deadline_ms: u64,
    },
    /// Cancels a call.
    Cancel { id: u64 },
}

/// A frame from the host to the daemon.
///
/// Externally tagged (`{"reply": {…}}`), since serde cannot read a [`RawValue`] under an internal tag.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromHost {
    /// The plugin is loaded and, unless it is only described, has an instance.
    Hello {
        /// Major version of the plugin ABI.
        abi: u32,
        describe: Description,
    },
    /// The plugin cannot be used; the host is about to exit.
    Refused { error: CallError },
    /// The host has to end while its plugin runs (memory limit).
    Dying { error: CallError },
    /// A call has ended, with a result or an error.
    Reply {
        id: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ok: Option<Box<RawValue>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<CallError>,
    },
    /// A line for the log.
    Log {
        /// `error`, `warn`, `info` or `debug`.
        level: String,
        message: String,
    },
}

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("a frame of {len} bytes is over the limit of {MAX_FRAME}")]
    TooLong { len: usize },
    /// The body is not a frame.
    #[error("the bytes `{start}` are not a frame")]
    Garbage {
        /// The beginning of the body, escaped.
        start: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("the connection ended in the middle of a frame")]
    Truncated,
}

/// Returns the bytes of a frame, with its length.
pub fn encode<T: Serialize>(frame: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, frame).map_err(io::Error::from)?;
    let len = bytes.len() - 4;
    match u32::try_from(len) {
        Ok(header) if len <= MAX_FRAME => {
            bytes[..4].copy_from_slice(&header.to_le_bytes());
            Ok(bytes)
        }
        _ => Err(FrameError::TooLong { len }),
    }
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(body).map_err(|source| {
        let start = &body[..body.len().min(40)];
        FrameError::Garbage { start: String::from_utf8_lossy(start).escape_debug().to_string(), source }
    })
}

/// Returns the length of the body, if it is within the limit.
fn body_length(header: [u8; 4]) -> Result<usize, FrameError> {
    let len = u32::from_le_bytes(header) as usize;
    if len > MAX_FRAME {
        return Err(FrameError::TooLong { len });
    }
    Ok(len)
}

/// Writes one frame, blocking.
pub fn write_frame<T: Serialize>(stream: &mut impl Write, frame: &T) -> Result<(), FrameError> {
    stream.write_all(&encode(frame)?)?;
    Ok(())
}

/// Reads one frame, blocking; `None` at a clean end.
pub fn read_frame<T: DeserializeOwned>(stream: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut header = [0; 4];
    let mut got = 0;
    while got < header.len() {
        match stream.read(&mut header[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => return Err(FrameError::Truncated),
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut body = vec![0; body_length(header)?];
    stream.read_exact(&mut body)?;
    decode(&body).map(Some)
}

/// Reads frames from the host.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    /// Bytes that were read and not yet returned as a frame.
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// Reads the next frame; `None` at a clean end. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<FromHost>, FrameError> {
        loop {
            if let Some(header) = self.buffer.first_chunk::<4>() {
                // Checked before the body is buffered, which limits the memory that a host can use up here.
                let end = 4 + body_length(*header)?;
                if self.buffer.len() >= end {
                    let frame = decode(&self.buffer[4..end]);
                    self.buffer.drain(..end);
                    // Releases the memory of a large frame.
                    self.buffer.shrink_to(64 * 1024);
                    return frame.map(Some);
                }
            }
            self.buffer.reserve(16 * 1024);
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(FrameError::Truncated),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    fn log(message: &str) -> FromHost {
        FromHost::Log { level: "info".into(), message: message.into() }
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().build().unwrap()
    }

    #[test]
    fn frames_survive_being_cut_anywhere() {
        let mut bytes = encode(&log("one")).unwrap();
        bytes.extend(encode(&log("two")).unwrap());
        runtime().block_on(async {
            let (mut near, far) = tokio::io::duplex(3);
            let writer = tokio::spawn(async move { near.write_all(&bytes).await });
            let mut reader = FrameReader::new(far);
            for expected in ["one", "two"] {
                match reader.next().await.unwrap() {
                    Some(FromHost::Log { message, .. }) => assert_eq!(message, expected),
                    other => panic!("{other:?}"),
                }
            }
            writer.await.unwrap().unwrap();
            assert!(reader.next().await.unwrap().is_none());
        });
    }

    #[test]
    fn a_length_over_the_cap_is_refused_before_its_body_arrives() {
        runtime().block_on(async {
            let mut reader = FrameReader::new(&b"garbage"[..]);
            let error = reader.next().await.unwrap_err();
            assert!(matches!(error, FrameError::TooLong { .. }), "{error}");
        });
    }

    #[test]
    fn a_body_that_is_no_frame_is_shown_in_the_error() {
        runtime().block_on(async {
            let mut reader = FrameReader::new(&b"\x05\0\0\0hi\x1bho"[..]);
            let error = reader.next().await.unwrap_err();
            assert!(error.to_string().contains("`hi\\u{1b}ho`"), "{error}");
            let mut reader = FrameReader::new(&b"\x05\0\0\0hi"[..]);
            assert!(matches!(reader.next().await, Err(FrameError::Truncated)));
        });
    }

    #[test]
    fn a_frame_over_the_cap_is_not_sent() {
        let long = log(&"x".repeat(MAX_FRAME));
        assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
    }
}
