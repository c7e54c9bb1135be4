//! Handlers of `context.*`.

use fermata_core::command::Command;
use fermata_core::context::TokenLimit;
use fermata_core::score::{score, tier};
use fermata_protocol::context::{
    ContextFlashSave, ContextItem, ContextList, ContextListResult, ContextPin, ContextPut, ContextPutResult,
    ContextRecall, ContextSearch, ContextShow, FlashSaveResult, MAX_ITEM_BYTES, NewItem,
};
use fermata_protocol::{AgentName, Code, ProjectName, Refusal, Target};
use serde_json::{Value, json};

use super::reply::wire;
use super::reports::{agent_of, owns, project_of, secrets};
use crate::errors::Failure;
use crate::operations::blocking;
use crate::operations::pause::flash_save as plans;
use crate::project::{ProjectHandle, Projects, Tell, View};
use crate::services::{Services, now};
use crate::store::commit::Write;
use crate::store::context::{self, NewRow, Selection};
use crate::store::idempotency::Keyed;
use crate::store::{Connection, StoreError};

/// The most items of one call.
const MAX_ITEMS: usize = 1000;

/// The most rows of one list.
const MAX_ROWS: u32 = 1000;

pub(super) async fn put(projects: &Projects, params: ContextPut, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let (handle, agent) = agent_of(projects, params.target.as_ref())?;
    check(&params.items)?;
    let services = std::sync::Arc::clone(projects.services());
    let secrets = secrets(projects, &handle, &agent).await?;
    let mut items = params.items;
    for item in &mut items {
        item.text = secrets.redact(&item.text).into_owned();
    }
    let now = now();
    let rows = blocking("count tokens", move || Ok(count(&services, items, now))).await?;
    let added: u64 = rows.iter().map(|row| row.tokens).sum();
    let items = rows.len() as u64;
    let command = Command::AddContext { agent: agent.clone(), items, tokens: added };
    let view: View = Box::new(move |_, written| {
        let ids = written.ids.clone();
        json!(ContextPutResult { ids, tokens: added, total_tokens: 0, items_archived: 0 })
    });
    let writes = vec![Write::ContextInsert(agent.clone(), rows)];
    let reply = handle.tell(Tell { command, writes, tokens: Vec::new(), keyed, view }).await?;
    let mut result = with_total(projects, &handle, &agent, reply).await?;
    let config = handle.project().facts.config.clone();
    let limit = TokenLimit { tokens: config.token_limit, due_percent: config.flash_save_at_percent };
    if limit.is_due(result.total_tokens) {
        match save(&handle, Some(agent), None).await {
            Ok(saved) => {
                result.total_tokens = saved.tokens_after;
                result.items_archived = saved.items_archived;
            }
            // A pause that is under way makes its own flash save.
            Err(Failure::Refused(_)) => {}
            Err(fault) => return Err(fault),
        }
    }
    wire(&result)
}

/// Completes the remembered reply of a put.
pub(super) async fn finish_put(projects: &Projects, target: Option<&Target>, reply: Value) -> Result<Value, Failure> {
    let Ok((handle, agent)) = agent_of(projects, target) else { return Ok(reply) };
    wire(&with_total(projects, &handle, &agent, reply).await?)
}

/// Fills in the current total of the agent's items, which is not part of the remembered reply.
async fn with_total(
    projects: &Projects,
    handle: &ProjectHandle,
    agent: &AgentName,
    reply: Value,
) -> Result<ContextPutResult, Failure> {
    let result: ContextPutResult = serde_json::from_value(reply).map_err(|e| Failure::fault("read the new ids", &e))?;
    let (project, agent) = (handle.name(), agent.clone());
    let total_tokens = read(projects, move |c| context::tokens(c, &project, &agent)).await?;
    Ok(ContextPutResult { total_tokens, ..result })
}

fn check(items: &[NewItem]) -> Result<(), Refusal> {
    if items.is_empty() {
        return Err(Refusal::new(Code::InvalidParams, "'items' is empty".to_owned()));
    }
    if items.len() > MAX_ITEMS {
        return Err(Refusal::new(Code::TooLarge, format!("{} items are more than {MAX_ITEMS}", items.len()))
            .hint("put them in several calls"));
    }
    for (index, item) in items.iter().enumerate() {
        if item.text.trim().is_empty() {
            return Err(Refusal::new(Code::InvalidParams, format!("item {index} has no text")));
        }
        if item.text.len() > MAX_ITEM_BYTES {
            let message = format!("item {index} has {} bytes, more than {MAX_ITEM_BYTES}", item.text.len());
            return Err(Refusal::new(Code::TooLarge, message).hint("split it"));
        }
    }
    Ok(())
}

fn count(services: &Services, items: Vec<NewItem>, now: fermata_protocol::UnixMillis) -> Vec<NewRow> {
    let weights = services.weights();
    items
        .into_iter()
        .map(|item| {
            let tokens = services.tokens.count(&item.text);
            let score = score(&weights, item.kind, now, 0, now);
            let tier = tier(score, item.pinned);
            NewRow { kind: item.kind, text: item.text, tokens, score, tier, pinned: item.pinned }
        })
        .collect()
}

async fn read<T: Send + 'static>(
    projects: &Projects,
    query: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Failure> {
    projects.services().store.read(query).await.map_err(|e| Failure::fault("read the context", &e))
}

/// Resolves a target that is a project or an agent; [`crate::auth`] has filled it in for an agent's own calls.
fn split(projects: &Projects, target: Option<Target>) -> Result<(ProjectHandle, Option<AgentName>), Failure> {
    match target {
        Some(Target { project, agent: None }) => Ok((projects.get(&project)?, None)),
        target => agent_of(projects, target.as_ref()).map(|(handle, agent)| (handle, Some(agent))),
    }
}

pub(super) async fn list(projects: &Projects, params: ContextList) -> Result<Value, Failure> {
    let (handle, agent) = split(projects, params.target)?;
    let selection = Selection {
        agent,
        tier: params.tier,
        archived: params.archived,
        before: params.before,
        limit: params.limit.unwrap_or(100).min(MAX_ROWS),
    };
    let project = handle.name();
    let items = read(projects, move |c| context::list(c, &project, &selection)).await?;
    wire(&ContextListResult { items })
}

pub(super) async fn show(projects: &Projects, params: &ContextShow, own: Option<&Target>) -> Result<Value, Failure> {
    let handle = project_of(projects, params.project.as_ref())?;
    let item = find(projects, &handle, params.id, own).await?;
    let (project, id) = (handle.name(), params.id);
    projects
        .services()
        .store
        .write(crate::store::Durability::Process, move |c| context::count_access(c, &project, id))
        .await
        .map_err(|e| Failure::fault("count the access", &e))?;
    wire(&item)
}

/// Finds an item; items of other agents do not exist for an agent.
async fn find(
    projects: &Projects,
    handle: &ProjectHandle,
    id: i64,
    own: Option<&Target>,
) -> Result<ContextItem, Failure> {
    let project: ProjectName = handle.name();
    let name = project.clone();
    let item = read(projects, move |c| context::find(c, &name, id)).await?;
    item.filter(|item| owns(own, Some(&item.agent))).ok_or_else(|| {
        Refusal::new(Code::ContextItemNotFound, format!("project '{project}' has no context item {id}"))
            .hint(format!("fermatactl context ls {project}"))
            .into()
    })
}

pub(super) async fn pin(
    projects: &Projects,
    params: &ContextPin,
    own: Option<&Target>,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = project_of(projects, params.project.as_ref())?;
    find(projects, &handle, params.id, own).await?;
    let command = Command::PinContext { id: params.id, pinned: params.pinned };
    let writes = vec![Write::ContextPin(params.id, params.pinned)];
    handle.tell(Tell { command, writes, tokens: Vec::new(), keyed, view: Box::new(|_, _| json!({})) }).await
}

pub(super) async fn search(projects: &Projects, params: ContextSearch) -> Result<Value, Failure> {
    let (handle, agent) = split(projects, params.target)?;
    let project = handle.name();
    let limit = params.limit.unwrap_or(20).min(MAX_ROWS);
    let query = params.query;
    let items = read(projects, move |c| context::search(c, &project, agent.as_ref(), &query, limit)).await?;
    wire(&ContextListResult { items })
}

pub(super) async fn recall(
    projects: &Projects,
    params: ContextRecall,
    own: Option<&Target>,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = project_of(projects, params.project.as_ref())?;
    if params.ids.is_empty() || params.ids.len() > MAX_ITEMS {
        return Err(Refusal::new(Code::InvalidParams, format!("'ids' names 1 to {MAX_ITEMS} items")).into());
    }
    for id in &params.ids {
        find(projects, &handle, *id, own).await?;
    }
    let command = Command::RecallContext { ids: params.ids.clone() };
    let writes = vec![Write::ContextRecall(params.ids)];
    handle.tell(Tell { command, writes, tokens: Vec::new(), keyed, view: Box::new(|_, _| json!({})) }).await
}

pub(super) async fn flash_save(
    projects: &Projects,
    params: ContextFlashSave,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let (handle, agent) = split(projects, params.target)?;
    wire(&save(&handle, agent, keyed).await?)
}

/// Plans and applies a flash save outside a pause.
async fn save(
    handle: &ProjectHandle,
    agent: Option<AgentName>,
    keyed: Option<Keyed>,
) -> Result<FlashSaveResult, Failure> {
    let planned = plans::plan(&handle.step_context(), agent, now()).await?;
    let total = plans::total(&planned);
    let results = planned.iter().map(|(agent, plan)| (agent.clone(), plan.result)).collect();
    let writes = planned.into_iter().map(|(_, plan)| Write::FlashSave(plan)).collect();
    let view: View = Box::new(move |_, _| json!(total));
    handle.tell(Tell { command: Command::FlashSave { results }, writes, tokens: Vec::new(), keyed, view }).await?;
    Ok(total)
}
