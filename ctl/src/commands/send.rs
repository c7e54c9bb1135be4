//! `send`: types into an agent's terminal without attaching to it.

use std::io::{self, Read as _};

use fermata_protocol::terminal::{AgentSend, Bytes, MAX_INPUT_BYTES, TypedResult};

use super::{Ended, one_agent};
use crate::cli::SendArgs;
use crate::errors::Failure;
use crate::keys;
use crate::session::Session;

/// Runs `send`.
pub fn send(session: &mut Session, args: &SendArgs) -> Ended {
    let mut data = args.text.join(" ").into_bytes();
    if args.stdin {
        io::stdin().lock().read_to_end(&mut data).map_err(|error| Failure::io("read stdin", &error))?;
    }
    if let Some(names) = &args.keys {
        data.extend(keys::bytes(names).map_err(|error| Failure::usage(format!("--keys: {error}")))?);
    }
    if args.enter {
        data.push(b'\r');
    }
    if data.is_empty() {
        return Err(Failure::usage("there is nothing to type").hint("give a TEXT, --enter, --keys or --stdin"));
    }
    let target = one_agent(session, &args.target)?;
    let mut typed = 0;
    for piece in data.chunks(MAX_INPUT_BYTES) {
        let send = AgentSend { target: target.clone(), data: Bytes(piece.to_vec()), anyway: args.anyway };
        let taken = session.call(&send)?.bytes;
        typed += taken;
        if taken < piece.len() as u64 {
            return Err(Failure::local(format!(
                "{target} does not read: {typed} of {} bytes were typed, the rest was not",
                data.len()
            )));
        }
    }
    let result = TypedResult { bytes: typed, claimed: false };
    session.out.said(&result, format_args!("{typed} bytes typed into {target}"))?;
    Ok(0)
}
