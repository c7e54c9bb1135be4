//! `send`: input for the terminal of an agent, without attaching to it.

use std::io::{self, Read as _};

use fermata_protocol::terminal::{AgentSend, Bytes, MAX_INPUT_BYTES, TypedResult};

use super::arguments::one_agent;
use crate::cli::SendArgs;
use crate::errors::{CommandError, CommandResult};
use crate::keys;
use crate::session::DaemonSession;
use crate::units::counted;

pub fn send(session: &mut DaemonSession, args: &SendArgs) -> CommandResult {
    let mut data = args.text.join(" ").into_bytes();
    if args.stdin {
        io::stdin().lock().read_to_end(&mut data).map_err(|error| CommandError::io("read stdin", &error))?;
    }
    if let Some(names) = &args.keys {
        data.extend(keys::bytes(names).map_err(|error| CommandError::usage(format!("--keys: {error}")))?);
    }
    if args.enter {
        data.push(b'\r');
    }
    if data.is_empty() {
        return Err(CommandError::usage("nothing to send").hint("give a TEXT, --enter, --keys or --stdin"));
    }
    let target = one_agent(session, &args.target)?;
    let mut typed = 0;
    for piece in data.chunks(MAX_INPUT_BYTES) {
        let send = AgentSend { target: target.clone(), data: Bytes(piece.to_vec()), anyway: args.anyway };
        let accepted = session.call(&send)?.bytes;
        typed += accepted;
        if accepted < piece.len() as u64 {
            return Err(CommandError::local(format!(
                "{target} does not read its input: only {typed} of {} bytes were sent",
                data.len()
            )));
        }
    }
    let result = TypedResult { bytes: typed, claimed: false };
    session.out.sentence(&result, format_args!("{} sent to {target}", counted(typed, "byte")))?;
    Ok(0)
}
