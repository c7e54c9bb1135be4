//! The frames between the daemon and a plugin host: a length (u32, little endian), then JSON.
//!
//! Owns both directions' types and the two codecs: a blocking one for the host, a cancel-safe
//! one for the daemon. The daemon trusts nothing that comes in: a length over the cap or a body
//! that is no frame ends the connection.

use fermata_plugin_api::{CallError, Description};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use std::io::{self, Read, Write};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest body of a frame, in bytes.
pub const MAX_FRAME: usize = 16 * 1024 * 1024;

/// What the daemon tells the host.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToHost {
    /// Runs a method of the plugin.
    Call {
        /// Number of the call, rising.
        id: u64,
        /// Name of the method.
        method: String,
        /// Its parameters.
        params: Value,
        /// Milliseconds until the daemon gives up.
        deadline_ms: u64,
    },
    /// Asks the host to have a call given up.
    Cancel {
        /// Number of that call.
        id: u64,
    },
}

/// What the host tells the daemon.
///
/// Tagged from outside (`{"reply": {…}}`): an inner tag could not carry a [`RawValue`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromHost {
    /// The plugin is loaded (and, unless it is only checked, has an instance).
    Hello {
        /// Major version of the plugin ABI.
        abi: u32,
        /// Who the plugin is.
        describe: Description,
    },
    /// The plugin cannot be used as things are; the host is about to exit.
    Refused {
        /// Why.
        error: CallError,
    },
    /// The host has to give up on its plugin now (memory); it is about to exit.
    Dying {
        /// Why.
        error: CallError,
    },
    /// A call has ended.
    Reply {
        /// Number of the call.
        id: u64,
        /// Its result (any JSON), when it went well.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ok: Option<Box<RawValue>>,
        /// Why it failed, otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<CallError>,
    },
    /// A line for the log.
    Log {
        /// `error`, `warn`, `info` or `debug`.
        level: String,
        /// The line.
        message: String,
    },
}

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The length is over the cap.
    #[error("a frame of {len} bytes is over the limit of {MAX_FRAME}")]
    TooLong {
        /// The length that was announced.
        len: usize,
    },
    /// The body is not a frame.
    #[error("the bytes `{start}` are not a frame")]
    Garbage {
        /// How the body begins, made printable.
        start: String,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// The connection ended in the middle of a frame.
    #[error("the connection ended in the middle of a frame")]
    Truncated,
}

/// Turns a frame into its bytes, length included.
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

fn announced(header: [u8; 4]) -> Result<usize, FrameError> {
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
    let mut body = vec![0; announced(header)?];
    stream.read_exact(&mut body)?;
    decode(&body).map(Some)
}

/// Reads frames from the host; what was read of an unfinished frame survives cancellation.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `stream`.
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// Reads the next frame; `None` at a clean end. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<FromHost>, FrameError> {
        loop {
            if let Some(header) = self.buffer.first_chunk::<4>() {
                // Checked before the body is waited for: nobody fills memory by announcing it.
                let end = 4 + announced(*header)?;
                if self.buffer.len() >= end {
                    let frame = decode(&self.buffer[4..end]);
                    self.buffer.drain(..end);
                    // A single huge frame must not keep its memory for ever.
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
