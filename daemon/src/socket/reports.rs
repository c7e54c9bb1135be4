//! Handlers of the reports of agents and the answers of people: progress, usage, state, tasks, questions.

use std::sync::Arc;
use std::time::Duration;

use fermata_core::command::Command;
use fermata_core::redact::Secrets;
use fermata_protocol::agent::{AgentProgress, AgentUsage, Progress, StateGetResult, StatePut};
use fermata_protocol::budget::Usage;
use fermata_protocol::question::{QuestionAnswer, QuestionAsk, QuestionList, QuestionListResult, QuestionWait};
use fermata_protocol::task::{TaskListResult, TaskPut};
use fermata_protocol::{AgentName, Code, ProjectName, Refusal, Target};
use serde_json::{Value, json};

use super::connection::ClientConnection;
use super::reply::wire;
use crate::errors::Failure;
use crate::project::{ProjectHandle, Projects, Tell, View};
use crate::services::{Channels, now};
use crate::store::commit::Write;
use crate::store::idempotency::Keyed;
use crate::store::rows;

/// The largest saved state of an agent, as JSON text.
const MAX_STATE_BYTES: usize = 256 << 10;

/// Finds the target agent of a call; [`crate::auth`] has filled the target in for an agent's own calls.
pub(super) fn agent_of(projects: &Projects, target: Option<&Target>) -> Result<(ProjectHandle, AgentName), Failure> {
    let missing = || Failure::from(Refusal::new(Code::InvalidParams, "'target' is missing".to_owned()));
    let target = target.ok_or_else(missing)?;
    let handle = projects.get(&target.project)?;
    let name = target.agent.clone().ok_or_else(missing)?;
    if !handle.project().agents.contains_key(&name) {
        return Err(Refusal::new(Code::AgentNotFound, format!("there is no agent {target}"))
            .hint(format!("fermatactl ps {}", target.project))
            .into());
    }
    Ok((handle, name))
}

pub(super) fn project_of(projects: &Projects, project: Option<&ProjectName>) -> Result<ProjectHandle, Failure> {
    let name = project.ok_or_else(|| Refusal::new(Code::InvalidParams, "'project' is missing".to_owned()))?;
    projects.get(name)
}

/// Returns the secrets in an agent's environment, to be redacted in its reports.
pub(super) async fn secrets(
    projects: &Projects,
    handle: &ProjectHandle,
    agent: &AgentName,
) -> Result<Secrets, Failure> {
    let secrets = projects.services().secrets_of(&handle.name(), agent).await;
    secrets.map_err(|e| Failure::fault("read the agent's environment", &e))
}

/// Returns whether a caller may access an object: people may access all objects, an agent its own and those without an
/// owner.
pub(super) fn owns(own: Option<&Target>, owner: Option<&AgentName>) -> bool {
    match (own.and_then(|own| own.agent.as_ref()), owner) {
        (Some(own), Some(owner)) => own == owner,
        (None, _) | (_, None) => true,
    }
}

fn simple(command: Command, keyed: Option<Keyed>) -> Tell {
    Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed, view: Box::new(|_, _| json!({})) }
}

pub(super) fn listen(connection: &Arc<ClientConnection>) -> Result<Value, Failure> {
    let peer = connection.peer();
    let Some(agent) = &peer.agent else {
        return Err(Refusal::new(Code::PermissionDenied, "only an agent can listen for pause requests".to_owned())
            .hint("call hello with the token in FERMATA_TOKEN")
            .into());
    };
    let services = connection.daemon.projects.services();
    connection.keep_channel(Channels::open(services, agent, connection.notifications()));
    Ok(json!({}))
}

pub(super) fn acknowledge(connection: &ClientConnection, target: Option<&Target>) -> Result<Value, Failure> {
    let (_, name) = agent_of(&connection.daemon.projects, target)?;
    if let Some(target) = target
        && !connection.daemon.projects.services().channels.acknowledge(target)
    {
        return Err(Refusal::new(Code::InvalidParams, format!("agent '{name}' was not asked to pause"))
            .hint("call agent.listen, and acknowledge the requests that arrive on that connection")
            .into());
    }
    Ok(json!({}))
}

pub(super) async fn progress(
    projects: &Projects,
    params: AgentProgress,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let (handle, agent) = agent_of(projects, params.target.as_ref())?;
    let secrets = secrets(projects, &handle, &agent).await?;
    let progress = Progress {
        percent: params.percent,
        message: params.message.map(|message| secrets.redact(&message).into_owned()),
        units_done: params.units_done,
        reported_at: now(),
    };
    handle.tell(simple(Command::Progress { agent, progress, phase: params.phase }, keyed)).await
}

pub(super) async fn ready(
    projects: &Projects,
    target: Option<&Target>,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let (handle, agent) = agent_of(projects, target)?;
    handle.tell(simple(Command::Ready { agent, run: None }, keyed)).await
}

pub(super) async fn usage(projects: &Projects, params: AgentUsage, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let (handle, agent) = agent_of(projects, params.target.as_ref())?;
    let usage = Usage {
        input_tokens: params.input_tokens,
        output_tokens: params.output_tokens,
        cost_micro_usd: params.cost_micro_usd,
    };
    handle.tell(simple(Command::Use { agent, usage }, keyed)).await
}

pub(super) async fn put_state(projects: &Projects, params: StatePut, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let (handle, agent) = agent_of(projects, params.target.as_ref())?;
    let text = params.state.to_string();
    if text.len() > MAX_STATE_BYTES {
        return Err(Refusal::new(
            Code::TooLarge,
            format!("the state has {} bytes as JSON, more than {MAX_STATE_BYTES}", text.len()),
        )
        .hint("keep large data in files of the workspace, and their names in the state")
        .into());
    }
    let mut tell = simple(Command::SaveState { agent: agent.clone(), bytes: text.len() as u64 }, keyed);
    tell.writes.push(Write::AgentState(agent, text));
    handle.tell(tell).await
}

pub(super) async fn get_state(projects: &Projects, target: Option<&Target>) -> Result<Value, Failure> {
    let (handle, agent) = agent_of(projects, target)?;
    let project = handle.name();
    let saved = projects
        .services()
        .store
        .read(move |connection| rows::load_agent_state(connection, &project, &agent))
        .await
        .map_err(|e| Failure::fault("read the agent's state", &e))?;
    let (state, saved_at) = saved.map_or((Value::Null, None), |(state, at)| (state, Some(at)));
    wire(&StateGetResult { state, saved_at })
}

pub(super) async fn put_task(
    projects: &Projects,
    params: TaskPut,
    own: Option<&Target>,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let target = params.target.as_ref();
    let handle = project_of(projects, target.map(|t| &t.project))?;
    if let (Some(own), Some(task)) = (own, params.id.and_then(|id| handle.project().tasks.get(&id).cloned()))
        && !owns(Some(own), task.agent.as_ref())
    {
        let message = format!("agent {own} may not change task {}, which belongs to another agent", task.id);
        return Err(Refusal::new(Code::PermissionDenied, message).into());
    }
    let agent = target.and_then(|t| t.agent.clone());
    let (id, expected) = (params.id, params.id.unwrap_or(0));
    let command = Command::PutTask { agent, id, title: params.title, status: params.status, percent: params.percent };
    let view: View = Box::new(move |project, _| {
        // The counter is the id of the newest task.
        let id = if expected == 0 { project.counters.task } else { expected };
        project.tasks.get(&id).map_or(Value::Null, |task| json!(**task))
    });
    handle.tell(Tell { view, ..simple(command, keyed) }).await
}

pub(super) fn list_tasks(projects: &Projects, project: Option<&ProjectName>) -> Result<Value, Failure> {
    let project = project_of(projects, project)?.project();
    wire(&TaskListResult { tasks: project.tasks.values().map(|task| (**task).clone()).collect() })
}

pub(super) async fn ask(projects: &Projects, params: QuestionAsk, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let (handle, agent) = agent_of(projects, params.target.as_ref())?;
    let secrets = secrets(projects, &handle, &agent).await?;
    let text = secrets.redact(&params.text).into_owned();
    let command = Command::Ask { agent, text, choices: params.choices };
    let view: View = Box::new(|project, _| {
        project.questions.get(&project.counters.question).map_or(Value::Null, |question| json!(**question))
    });
    handle.tell(Tell { view, ..simple(command, keyed) }).await
}

pub(super) async fn wait_for_answer(
    projects: &Projects,
    params: &QuestionWait,
    own: Option<&Target>,
) -> Result<Value, Failure> {
    let handle = project_of(projects, params.project.as_ref())?;
    let mut state = handle.watch();
    let answered = async {
        loop {
            let project = state.borrow_and_update().clone();
            match project.questions.get(&params.id).filter(|question| owns(own, Some(&question.agent))) {
                None => {
                    let message = format!("project '{}' has no question {}", project.name, params.id);
                    return Err(Refusal::new(Code::QuestionNotFound, message).hint("fermatactl inbox").into());
                }
                Some(question) if question.answer.is_some() => return wire(&**question),
                Some(_) => {}
            }
            if state.changed().await.is_err() {
                return Err(Refusal::new(Code::ShuttingDown, "the daemon is shutting down".to_owned()).into());
            }
        }
    };
    match params.timeout_ms {
        None => answered.await,
        Some(ms) => match tokio::time::timeout(Duration::from_millis(ms), answered).await {
            Ok(result) => result,
            Err(_) => {
                let message = format!("question {} was not answered within {ms} ms", params.id);
                Err(Refusal::new(Code::TimedOut, message).into())
            }
        },
    }
}

pub(super) fn list_questions(projects: &Projects, params: &QuestionList) -> Result<Value, Failure> {
    let handles = match &params.project {
        Some(name) => vec![projects.get(name)?],
        None => projects.all(),
    };
    let questions = handles.iter().flat_map(|handle| {
        let project = handle.project();
        let wanted = project.questions.values().filter(|q| params.all || q.answer.is_none());
        wanted.map(|q| (**q).clone()).collect::<Vec<_>>()
    });
    wire(&QuestionListResult { questions: questions.collect() })
}

pub(super) async fn answer(
    projects: &Projects,
    params: QuestionAnswer,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    let id = params.id;
    let view: View =
        Box::new(move |project, _| project.questions.get(&id).map_or(Value::Null, |question| json!(**question)));
    handle.tell(Tell { view, ..simple(Command::Answer { id, answer: params.answer }, keyed) }).await
}
