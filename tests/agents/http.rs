//! The part of HTTP/1.1 that a model's client uses: one request of a known length, one reply.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;

pub struct Request {
    /// `GET` or `POST`.
    pub method: String,
    /// The path, with its query.
    pub path: String,
    pub body: Vec<u8>,
}

/// The longest accepted body, far more than a scripted conversation needs.
const MAX_BODY: usize = 64 << 20;

/// Reads one request, `None` when the peer closed the connection instead.
pub fn read_request(stream: &TcpStream) -> io::Result<Option<Request>> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Err(io::Error::other(format!("no request line: {line:?}")));
    };
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((name, value)) = header.trim_end().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().map_err(io::Error::other)?,
            "transfer-encoding" => return Err(io::Error::other("a body without a length")),
            "expect" => write!(&mut &*stream, "HTTP/1.1 100 Continue\r\n\r\n")?,
            _ => {}
        }
    }
    if length > MAX_BODY {
        return Err(io::Error::other(format!("a body of {length} bytes")));
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some(Request { method, path, body }))
}

/// Writes a reply and asks the client to close the connection.
pub fn write_reply(mut stream: &TcpStream, status: &str, content_type: &str, body: &str) -> io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )?;
    stream.flush()
}
