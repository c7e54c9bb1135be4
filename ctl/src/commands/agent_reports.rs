//! `agent …`: reports of an agent, which the daemon identifies by its token.

use fermata_protocol::agent::{AgentAck, AgentListen, AgentProgress, AgentReady, AgentUsage, StateGet, StatePut};
use fermata_protocol::question::QuestionAsk;
use fermata_protocol::task::TaskPut;

use super::arguments::text_or_stdin;
use super::{context, question, task};
use crate::cli::groups::{AgentCommand, StateCommand};
use crate::errors::{CommandError, CommandResult};
use crate::session::DaemonSession;

pub fn run(session: &mut DaemonSession, command: AgentCommand) -> CommandResult {
    match command {
        AgentCommand::Progress { percent, message, units, phase, target } => {
            let done = session.call(&AgentProgress { target, percent, message, units_done: units, phase })?;
            print_as_json(session, &done)
        }
        AgentCommand::Heartbeat { target } => {
            let heartbeat = AgentProgress { target, percent: None, message: None, units_done: None, phase: None };
            let done = session.call(&heartbeat)?;
            print_as_json(session, &done)
        }
        AgentCommand::Ready { target } => {
            let done = session.call(&AgentReady { target })?;
            print_as_json(session, &done)
        }
        AgentCommand::Context { item, target } => context::add(session, target, item),
        AgentCommand::Task { title, id, state, target } => {
            task::put(session, TaskPut { target, id, title, status: state.status, percent: state.percent })
        }
        AgentCommand::Ask { text, choice, wait, target } => {
            let asked = session.call(&QuestionAsk { target, text, choices: choice })?;
            if wait {
                return question::wait(session, Some(asked.project), asked.id);
            }
            let id = asked.id.to_string();
            session.out.object(&asked, Some(id), |out, asked| out.line(asked.id))?;
            Ok(0)
        }
        AgentCommand::WaitAnswer { question } => question::wait(session, question.project, question.id),
        AgentCommand::Ack { target } => {
            let done = session.call(&AgentAck { target })?;
            print_as_json(session, &done)
        }
        AgentCommand::State(command) => state(session, command),
        AgentCommand::Usage { input, output, cost, target } => {
            let done = session.call(&AgentUsage {
                target,
                input_tokens: input,
                output_tokens: output,
                cost_micro_usd: cost,
            })?;
            print_as_json(session, &done)
        }
        AgentCommand::Listen => listen(session),
    }
}

/// Prints nothing for people: agents report often.
fn print_as_json(session: &mut DaemonSession, done: &impl serde::Serialize) -> CommandResult {
    session.out.object(done, None, |_, _| Ok(()))?;
    Ok(0)
}

fn state(session: &mut DaemonSession, command: StateCommand) -> CommandResult {
    match command {
        StateCommand::Get { target } => {
            let result = session.call(&StateGet { target })?;
            session.out.object(&result, None, |out, result| out.json(&result.state))?;
            Ok(0)
        }
        StateCommand::Put { value, target } => {
            let text = text_or_stdin(value)?;
            let state = serde_json::from_str(&text)
                .map_err(|e| CommandError::usage(format!("the state is not valid JSON: {e}")))?;
            let done = session.call(&StatePut { target, state })?;
            print_as_json(session, &done)
        }
    }
}

/// Prints pause requests until the daemon shuts down and does not return.
fn listen(session: &mut DaemonSession) -> CommandResult {
    loop {
        session.call_across_restarts(&AgentListen {})?;
        while let Some(notification) = session.next_notification()? {
            if notification.method == "pause_requested" {
                session.out.json(&notification.params)?;
                session.out.flush()?;
            }
        }
    }
}
